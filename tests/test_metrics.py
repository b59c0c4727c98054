"""Metrics of images and their intervals, each against an independent computation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import random_image
from PIL import Image
from scipy.linalg import sqrtm
from vision_models import save_tiny_clip, save_tiny_dino

from trainer.core.errors import UsageError, WeightsError
from trainer.evaluation import Evaluation
from trainer.evaluation.intervals import estimate, resample
from trainer.evaluation.metrics import Pictures, Setup, all_metrics
from trainer.evaluation.metrics.fid import frechet_distance
from trainer.evaluation.metrics.ssim import ssim
from trainer.evaluation.vision import VisionModel

COLORS = ["red", "green", "blue", "red green", "blue green", "red blue"]
CPU = torch.device("cpu")


def pixels(seed: int) -> np.ndarray:
    return np.asarray(random_image(seed, (48, 40)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "clip": str(save_tiny_clip(folder / "clip")),
        "dino": str(save_tiny_dino(folder / "dino")),
        "features": None,
    }


@pytest.fixture(scope="module")
def setup(models: dict[str, str | None]) -> Setup:
    return Setup(CPU, models, None, [pixels(seed) for seed in range(50, 58)], [f"photo {i}" for i in range(8)])


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    """Two images for each of three prompts."""
    images, targets = [pixels(seed) for seed in range(6)], [pixels(seed) for seed in range(10, 16)]
    return Pictures("run", images, COLORS, [0, 0, 1, 1, 2, 2], targets)


def value(name: str, setup: Setup, pictures: Pictures) -> float:
    metric = all_metrics()[name]
    assert metric.missing(setup, pictures) is None
    return metric.statistic(setup, pictures)(np.arange(len(pictures.images)))


def clip_output(models: dict[str, str | None], images: list[np.ndarray], texts: list[str]) -> Any:
    from transformers import CLIPModel, CLIPProcessor

    model: Any = CLIPModel.from_pretrained(models["clip"]).eval()
    processor: Any = CLIPProcessor.from_pretrained(models["clip"])
    inputs = processor(text=texts, images=[Image.fromarray(i) for i in images], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs)


def dino_embeddings(models: dict[str, str | None], images: list[np.ndarray]) -> torch.Tensor:
    from transformers import BitImageProcessor, Dinov2Model

    model: Any = Dinov2Model.from_pretrained(models["dino"]).eval()
    processor: Any = BitImageProcessor.from_pretrained(models["dino"])
    with torch.no_grad():
        found = model(**processor(images=[Image.fromarray(i) for i in images], return_tensors="pt"))
    return found.last_hidden_state[:, 0]


def test_ssim_equals_that_of_scikit_image():
    """Values of scikit-image 0.26: structural_similarity(a, b, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=255, channel_axis=2)."""
    a, b = pixels(1), pixels(2)
    noise = np.random.default_rng(0).integers(-30, 30, a.shape)
    noisy = np.clip(a.astype(int) + noise, 0, 255).astype(np.uint8)
    assert ssim(a, b) == pytest.approx(-0.01950149939726138, abs=1e-12)
    assert ssim(a, noisy) == pytest.approx(0.8012988192406078, abs=1e-12)
    assert ssim(a, a) == 1


def test_ssim_is_the_mean_over_windows():
    a, b = pixels(3).astype(float), pixels(4).astype(float)
    line = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            for channel in range(3):
                x, y = (z[i : i + 11, j : j + 11, channel] for z in (a, b))
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                variance_x, variance_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                values.append(
                    (2 * mean_x * mean_y + 2.55**2)
                    * (2 * covariance + 7.65**2)
                    / ((mean_x**2 + mean_y**2 + 2.55**2) * (variance_x + variance_y + 7.65**2))
                )
    assert ssim(pixels(3), pixels(4)) == pytest.approx(np.mean(values), abs=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 50, 8), (10, 40, 16), (12, 9, 32)])
def test_frechet_distance_has_the_root_of_the_product_of_the_covariances(n: int, m: int, d: int):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, d)), 1.5 * rng.normal(size=(m, d)) + 0.3
    sx, sy = np.cov(x.T), np.cov(y.T)
    root = np.trace(sqrtm(sx @ sy).real)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx) + np.trace(sy) - 2 * root
    # The root of a singular matrix, of fewer vectors than dimensions, is exact to half of the digits only.
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9 if n > d else 1e-4)


def test_frechet_distance_equals_that_of_torchmetrics():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 8)), rng.normal(size=(50, 8)) * 1.5 + 0.3
    # torchmetrics 1.9: _compute_fid(mean, covariance, mean, covariance)
    assert frechet_distance(x, y) == pytest.approx(2.9126887808957562, rel=1e-12)


def test_kid_is_the_unbiased_estimate(setup: Setup, pictures: Pictures):
    x = dino_embeddings(setup.models, list(pictures.images)).double()
    y = dino_embeddings(setup.models, list(setup.training)).double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    within_x = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    within_y = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    expected = np.mean(within_x) + np.mean(within_y) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert value("kid", setup, pictures) == pytest.approx(expected, rel=1e-4)


def test_kid_equals_that_of_torchmetrics():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 8)), rng.normal(size=(50, 8)) * 1.5 + 0.3
    metric: Any = all_metrics()["kid"]
    # torchmetrics 1.9: poly_mmd(x[:50], y, degree=3, gamma=None, coef=1.0)
    assert metric.distance(x[:50], y)(np.arange(50)) == pytest.approx(0.691771385773607, rel=1e-12)


def test_cmmd_is_the_biased_estimate_of_vectors_of_length_1(setup: Setup, pictures: Pictures):
    x = clip_output(setup.models, list(pictures.images), ["red"]).image_embeds.double()
    y = clip_output(setup.models, list(setup.training), ["red"]).image_embeds.double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.exp(-(torch.cdist(a, b) ** 2) / (2 * 10**2)).mean())

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert value("cmmd", setup, pictures) == pytest.approx(expected, abs=1e-5)


def test_clip_metrics_are_cosine_similarities(setup: Setup, pictures: Pictures):
    found = clip_output(setup.models, list(pictures.images), COLORS)
    cosines = torch.cosine_similarity(found.image_embeds, found.text_embeds)
    assert value("clip_score", setup, pictures) == pytest.approx(float((100 * cosines).clamp(min=0).mean()), abs=1e-4)
    assert pictures.targets is not None
    targets = clip_output(setup.models, list(pictures.targets), COLORS).image_embeds
    expected = float(torch.cosine_similarity(found.image_embeds, targets).mean())
    assert value("clip_similarity", setup, pictures) == pytest.approx(expected, abs=1e-5)
    training = clip_output(setup.models, list(setup.training), COLORS).image_embeds
    expected = float((found.image_embeds @ training.T).mean())
    assert value("clip_subject", setup, pictures) == pytest.approx(expected, abs=1e-5)


def test_similarity_to_the_history_is_that_to_the_images_of_each_user(setup: Setup, pictures: Pictures):
    histories = [[pixels(100 + prompt), pixels(110 + prompt)] for prompt in pictures.prompts]
    own = dataclasses.replace(pictures, histories=histories)
    images = clip_output(setup.models, list(pictures.images), COLORS).image_embeds
    liked = [clip_output(setup.models, history, COLORS).image_embeds for history in histories]
    expected = np.mean([float((each @ image).mean()) for image, each in zip(images, liked, strict=True)])
    assert value("clip_history", setup, own) == pytest.approx(expected, abs=1e-5)
    assert "dataset=personalized" in str(all_metrics()["dino_history"].missing(setup, pictures))


def test_dino_metrics_use_the_class_token(setup: Setup, pictures: Pictures):
    images = dino_embeddings(setup.models, list(pictures.images))
    assert pictures.targets is not None
    targets = dino_embeddings(setup.models, list(pictures.targets))
    expected = float(torch.cosine_similarity(images, targets).mean())
    assert value("dino_similarity", setup, pictures) == pytest.approx(expected, abs=1e-5)
    pairs = [1 - float(torch.cosine_similarity(images[i], images[i + 1], dim=0)) for i in (0, 2, 4)]
    assert value("diversity", setup, pictures) == pytest.approx(np.mean(pairs), abs=1e-5)
    training = dino_embeddings(setup.models, list(setup.training))
    cosines = torch.cosine_similarity(images[:, None], training[None], dim=2)
    assert value("nearest", setup, pictures) == pytest.approx(float((1 - cosines.max(1).values).mean()), abs=1e-5)
    names = [text.rpartition(" (")[0] for text in all_metrics()["nearest"].notes(setup, pictures)]
    assert names == [f"nearest: photo {i}" for i in cosines.argmax(1).tolist()]


def test_copies_of_training_images_have_distance_0(setup: Setup, models: dict[str, str | None]):
    copies = Pictures("copies", [setup.training[2]], ["red"], [0], None)
    for chosen in (models, dict.fromkeys(models)):
        own = Setup(CPU, chosen, None, setup.training, setup.training_names)
        assert value("nearest", own, copies) == pytest.approx(0, abs=1e-6)
        (note,) = all_metrics()["nearest"].notes(own, copies)
        assert note.startswith("nearest: photo 2")


def test_metrics_without_a_model_say_what_to_type(pictures: Pictures):
    bare = Setup(CPU, {"clip": None, "dino": None, "features": None}, None, [pixels(1), pixels(2)], ["a", "b"])
    reasons = {name: metric.missing(bare, pictures) for name, metric in all_metrics().items()}
    assert {name for name, reason in reasons.items() if reason is None} == {"psnr", "ssim", "nearest"}
    assert all("type evaluation." in reason or "dataset=" in reason for reason in reasons.values() if reason)
    without_targets = Pictures("run", pictures.images, COLORS, range(6), None)
    assert all_metrics()["psnr"].missing(bare, without_targets) == "the prompts have no target images"
    one_each = all_metrics()["diversity"].missing(bare, without_targets)
    assert one_each is not None and "evaluation.images_per_prompt=4" in one_each


def test_a_model_that_cannot_be_read_is_named(tmp_path: Path, models: dict[str, str | None]):
    with pytest.raises(WeightsError, match=r"evaluation\.dino=.*facebook/dinov2-base"):
        VisionModel("evaluation.dino", str(tmp_path), CPU)
    setup = Setup(CPU, {"clip": models["dino"]}, None, [], [])
    with pytest.raises(WeightsError, match="reads no text"):
        assert setup.clip


@pytest.mark.parametrize("values", [{"lpips": "resnet"}, {"training_images": 1}])
def test_settings_of_metrics_are_checked(values: dict[str, Any]):
    with pytest.raises(UsageError, match="type"):
        Evaluation(**values)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        values = rng.normal(size=30)
        _, low, high = estimate(lambda indices, values=values: values[indices].mean(), range(30), 300)
        assert low is not None and high is not None
        held += low <= 0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_images_of_one_prompt_are_not_independent():
    """Four equal images of each prompt say no more than one."""
    values = np.random.default_rng(0).normal(size=10)
    one = estimate(lambda indices: values[indices].mean(), range(10), 500)
    four = estimate(lambda indices: np.repeat(values, 4)[indices].mean(), np.repeat(range(10), 4).tolist(), 500)
    assert four == pytest.approx(one)
    assert estimate(lambda indices: values[indices].mean(), [0] * 10, 500)[1:] == (None, None)


def test_the_interval_of_a_set_distance_is_around_its_value():
    """Bootstrap samples repeat images, which makes every distance larger."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 8)), rng.normal(size=(40, 8))
    statistic: Any = all_metrics()["fid"]
    found = estimate(statistic.distance(x, y), range(20), 100)
    larger = [statistic.distance(x, y)(indices) for indices in resample(range(20), 100)]
    assert np.mean(larger) > found.value
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
