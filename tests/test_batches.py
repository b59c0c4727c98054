"""Collating examples, and the micro-batches of a step: image sizes, masks, weights and posterior samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import NoiseSource

from trainer.cache.store import Cache, count_outcomes
from trainer.core.batch import collate, group_by_shape
from trainer.core.rng import normal
from trainer.dataset import Dataset
from trainer.dataset.sample import Sample
from trainer.dataset.transform import Resolution, Transform, TransformedSample
from trainer.model import Recipe
from trainer.objective import Flow, denoising_losses
from trainer.training.batches import Batches
from trainer.training.visits import Visit, Visits

TRANSFORM = Transform((Resolution("32", ((32, 32), (48, 32), (32, 48))),))


class Family:
    """The attributes of a family that batches use."""

    objective = Flow()

    def time_shift(self, height: int, width: int) -> float:
        return 1.0


def encode(name: str, sample: TransformedSample) -> torch.Tensor:
    if name == "mask":
        return torch.full((1, sample.height // 8, sample.width // 8), 0.5 if sample.sample.mask else 1.0)
    pixels = torch.from_numpy(sample.pixels("image")).permute(2, 0, 1)[:, ::8, ::8].float() / 255
    return torch.full_like(pixels, 0.25) if name == "latents_std" else pixels


def make_batches(
    samples: list[Sample], folder: Path, names: tuple[str, ...] = ("latents",), settings: Dataset | None = None
) -> Batches:
    """Batches of samples whose tensors `names` are in a new cache."""
    cache = Cache(folder, {name: Recipe(("mask",) if name == "mask" else ("image",), "test") for name in names})
    missing = cache.missing([TRANSFORM.apply(sample) for sample in samples])
    count_outcomes(cache.recipes, cache.encode_missing(missing, encode))
    visits = Visits(0, 6, settings or Dataset(), TRANSFORM, samples)
    return Batches(visits, cache, Family(), micro_batch_size=2)


def visit(batches: Batches, number: int, index: int) -> Visit:
    return Visit(number, batches.visits.training[index], TRANSFORM.resolutions[0])


def make_samples() -> list[Sample]:
    sizes = [(64, 64), (90, 60), (60, 90), (128, 120), (100, 60)]
    return [Sample(f"sample {i}", NoiseSource(f"{i}", *size), "a caption") for i, size in enumerate(sizes)]


def test_a_micro_batch_has_one_image_size_and_a_step_all_its_samples(tmp_path: Path):
    batches = make_batches(make_samples(), tmp_path)
    ids = []
    for step in range(1, 6):
        _, micro_batches = batches[step]
        assert all(len(batch["t"]) <= 2 for batch in micro_batches)
        assert all(len({tuple(latents.shape) for latents in batch["latents"]}) == 1 for batch in micro_batches)
        assert sum(len(batch["t"]) for batch in micro_batches) == 6
        ids += batches.sample_ids(step)
    assert {id: ids.count(id) for id in ids} == {sample.id: 6 for sample in make_samples()}


def test_images_get_the_size_with_the_nearest_aspect_ratio():
    transformed = [TRANSFORM.apply(sample) for sample in make_samples()]
    assert [(sample.width, sample.height) for sample in transformed] == [
        (32, 32),
        (48, 32),
        (32, 48),
        (32, 32),
        (48, 32),
    ]


def test_only_dimension_0_is_padded():
    examples = [{"prompt": torch.ones(length, 2), "latents": torch.ones(3, 4, 4)} for length in (3, 5)]
    assert list(group_by_shape(examples, 8)) == [[0, 1]]
    prompts = collate(examples)["prompt"]
    assert prompts.shape == (2, 5, 2) and prompts[0, 3:].eq(0).all()
    wider = {"prompt": torch.ones(3, 2), "latents": torch.ones(3, 4, 5)}
    assert list(group_by_shape([*examples, wider], 8)) == [[0, 1], [2]]


def test_masks_and_sample_weights_scale_the_loss(tmp_path: Path):
    plain = make_samples()[:2]
    samples = [replace(plain[0], mask=NoiseSource("mask", 64, 64)), replace(plain[1], weight=3.0)]
    batches = make_batches(samples, tmp_path, ("latents", "mask"), Dataset(mask_floor=0.2))
    weights = [batches.example(visit(batches, i, i))["weight"].mean().item() for i in (0, 1)]
    assert weights == pytest.approx([0.2 + 0.8 * 0.5, 3.0])
    flow, clean = Flow(), torch.zeros(2, 4, 2, 2)
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).expand(2, 1, 2, 2)
    losses = denoising_losses(flow, lambda *_: torch.ones(2, 4, 2, 2), clean, clean, torch.zeros(2), {}, weight)
    assert losses.tolist() == [0.25, 0.25]


def test_the_posterior_is_sampled_anew_at_each_visit_but_equally_in_each_run(tmp_path: Path):
    batches = make_batches(make_samples(), tmp_path, ("latents", "latents_std"))
    first, again, later = (batches.example(visit(batches, number, 0))["latents"] for number in (0, 0, 7))
    mean = batches.cache.example(TRANSFORM.apply(batches.visits.training[0]))["latents"]
    assert torch.equal(first, again) and not torch.equal(first, later)
    torch.testing.assert_close(first, mean + 0.25 * normal(tuple(mean.shape), 0, "posterior", 0, "sample 0"))


def test_a_dropped_control_is_gray_and_has_its_own_cache_entry():
    sample = Sample("id", NoiseSource("target", 32, 32), "a caption", (NoiseSource("control", 32, 32),))
    kept, dropped = TRANSFORM.apply(sample), TRANSFORM.apply(sample, drop_control=True)
    assert set(dropped.pixels("control").flatten().tolist()) == {127}
    assert len(set(kept.pixels("control").flatten().tolist())) > 100
    assert kept.content_key("control") != dropped.content_key("control")
    assert kept.content_key("image") == dropped.content_key("image")


def test_the_geometry_of_a_crop_is_measured_in_the_scaled_image():
    sample = TransformedSample(Sample("id", NoiseSource("wide", 200, 100), "a caption"), 48, 48)
    assert sample.geometry() == (100, 200, 0, 24, 48, 48)
