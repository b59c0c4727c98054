"""Which samples a run visits at which step: at several resolutions, and with regularization images."""

from __future__ import annotations

import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from images import save_image
from layouts import write_captioned, write_concepts
from program import Harness, at_call, raise_signal, records
from synthetic import NoiseSource

from trainer.cache.store import Cache, count_outcomes
from trainer.core.batch import get_conditions
from trainer.core.rng import uniform
from trainer.dataset import Dataset
from trainer.dataset.regularization import Regularization
from trainer.dataset.sample import Sample
from trainer.dataset.transform import TransformedSample, build_transform
from trainer.model import Recipe
from trainer.objective import Flow, denoising_losses
from trainer.training.batches import Batches
from trainer.training.visits import Visits


def make_samples(count: int, name: str = "sample", side: int = 64, weight: float = 1.0) -> list[Sample]:
    sources = [NoiseSource(f"{name} {i}", side, side) for i in range(count)]
    return [Sample(source.name, source, "a caption", weight=weight) for source in sources]


def make_visits(samples: list[Sample], batch_size: int, others: list[Sample] | None = None, **settings) -> Visits:
    dataset = Dataset(**{"resolution": 32} | settings)
    return Visits(0, batch_size, dataset, build_transform(dataset, 8), samples, others or [])


class Family:
    """The attributes of a family that batches use. Times are shifted by the size of the latents."""

    objective = Flow()

    def time_shift(self, height: int, width: int) -> float:
        return float(height * width)


def encode(name: str, sample: TransformedSample) -> torch.Tensor:
    return torch.from_numpy(sample.pixels("image")).permute(2, 0, 1)[:, ::8, ::8].float() / 255


def make_batches(visits: Visits, folder: Path, steps: int, micro_batch_size: int = 8) -> Batches:
    """Batches of samples that are in a new cache where these steps use them."""
    cache = Cache(folder, {"latents": Recipe(("image",), "test")})
    used = [visits.transform.apply(sample, resolution) for sample, resolution in visits.used(steps)]
    count_outcomes(cache.recipes, cache.encode_missing(cache.missing(used), encode))
    return Batches(visits, cache, Family(), micro_batch_size)


# Resolutions


def test_resolutions_take_visits_by_their_weights_and_every_epoch_all_samples():
    visits = make_visits(make_samples(10), 5, resolution={16: 1, 32: 3})
    steps = [visits.of_step(step) for step in range(1, 401)]
    counts = Counter(visit.resolution.name for step in steps for visit in step)
    # The standard deviation of a binomial distribution with n = 2000 and p = 1/4 is 19.4.
    assert abs(counts["16"] - 500) < 4 * 19.4 and counts.total() == 2000
    assert {visit.sample.id for step in steps[2:4] for visit in step} == {f"sample {i}" for i in range(10)}
    again = make_visits(make_samples(10), 5, resolution={16: 1, 32: 3})
    assert again.of_step(300) == steps[299]


def test_more_resolutions_change_neither_the_order_nor_what_is_dropped():
    one, two = (make_visits(make_samples(6), 4, resolution=sizes, caption_dropout=0.5) for sizes in (32, [16, 32]))
    for step in range(1, 9):
        for first, second in zip(one.of_step(step), two.of_step(step), strict=True):
            assert (first.number, first.sample) == (second.number, second.sample)
            assert one.transformed(first).drop_caption == two.transformed(second).drop_caption


def test_a_small_image_visits_the_resolutions_that_max_upscale_allows():
    small, large = make_samples(1, "small", side=24)[0], make_samples(1, "large")[0]
    visits = make_visits([small, large], 2, resolution=[16, 32, 64], max_upscale=1.5)
    found = {(sample.id, resolution.name) for sample, resolution in visits.used(50)}
    assert found == {("small 0", "16"), ("small 0", "32"), ("large 0", "16"), ("large 0", "32"), ("large 0", "64")}
    # Held-out samples and generated images take the largest.
    assert [visits.transform.size_of(sample) for sample in (small, large)] == [(32, 32), (64, 64)]
    assert make_visits([small], 1, resolution=64, max_upscale=1.5).transform.resolutions_of(small.image) == ()


def test_each_resolution_has_its_buckets():
    dataset = Dataset(resolution=[64, 128], buckets=True)
    transform = build_transform(dataset, 8)
    for resolution in transform.resolutions:
        assert resolution.sizes == build_transform(Dataset(resolution=resolution.name, buckets=True), 8).sizes
    wide = Sample("wide", NoiseSource("wide", 200, 100), "a caption")
    small, large = (transform.size_of(wide, resolution) for resolution in transform.resolutions)
    assert small[0] > small[1] and large[0] > large[1] and large[0] * large[1] > 3 * small[0] * small[1]


def test_a_micro_batch_has_one_resolution_and_only_what_is_visited_is_cached(tmp_path: Path):
    visits = make_visits(make_samples(9), 8, resolution=[16, 32])
    batches = make_batches(visits, tmp_path, steps=1)
    _, micro_batches = batches[1]
    sides = [batch["latents"].shape[-1] for batch in micro_batches]
    assert sorted(sides) == [2, 4] and sum(len(batch["t"]) for batch in micro_batches) == 8
    assert len([*tmp_path.rglob("*.safetensors")]) == 8
    for visit in visits.of_step(1):
        side = visit.resolution.sizes[0][0] // 8
        quantile = uniform(0, "time", visit.number, visit.sample.id)
        expected = Flow().quantile_to_time(quantile, shift=side**2)
        assert batches.example(visit)["t"].item() == pytest.approx(expected)


# Regularization images


@pytest.mark.parametrize(("batch_size", "share"), [(4, 0.5), (1, 0.5), (3, 0.3), (10, 0.1), (7, 0.9), (2, 1 / 3)])
def test_regularization_images_take_their_share_of_each_batch(batch_size: int, share: float):
    regularization = Regularization("folder", share=share)
    visits = make_visits(make_samples(5), batch_size, make_samples(4, "other"), regularization=regularization)
    steps = [visits.of_step(step) for step in range(1, 200)]
    names = [[visit.sample.id.split()[0] for visit in step] for step in steps]
    assert {step.count("other") for step in names} <= {int(batch_size * share), int(batch_size * share) + 1}
    total = sum(step.count("other") for step in names)
    assert total == pytest.approx(199 * batch_size * share, abs=1)
    for name, count in (("sample", 5), ("other", 4)):
        stream = [visit.sample.id for step in steps for visit in step if visit.sample.id.startswith(name)]
        epochs = [stream[i : i + count] for i in range(0, len(stream) - count, count)]
        assert all(len({*epoch}) == count for epoch in epochs) and len({*map(tuple, epochs)}) > 1
    # The number of steps of some epochs is the smallest with enough visits of training samples.
    for wanted in range(1, 60):
        fewest = visits.steps_for(wanted)
        assert visits.training_count(fewest) >= wanted > visits.training_count(fewest - 1)
        counted = sum(step.count("sample") for step in names[:fewest])
        assert counted == visits.training_count(fewest)


def test_the_loss_is_that_of_prior_preservation(tmp_path: Path):
    """As in diffusers' train_dreambooth.py: the mean over the samples plus the weight times the mean over the others.

    That script has two batches of equal size, so its loss is twice as large.
    """
    weight = 0.3
    regularization = Regularization("folder", weight=weight)
    others = make_samples(4, "other", weight=weight)
    visits = make_visits(make_samples(4), 4, others, regularization=regularization)
    batches = make_batches(visits, tmp_path, steps=1)

    def predict(noisy: torch.Tensor, t: torch.Tensor, conditions: dict) -> torch.Tensor:
        return noisy.roll(1, dims=3) + t[:, None, None, None]

    (batch,) = batches[1][1]
    inputs = batch["latents"], batch["noise"], batch["t"], get_conditions(batch), batch["weight"]
    loss = denoising_losses(Flow(), predict, *inputs).sum() / 4

    means = {"sample": [], "other": []}
    for visit in visits.of_step(1):
        example = batches.example(visit)
        latents, noise, t = example["latents"], example["noise"], example["t"]
        noisy = (1 - t) * latents + t * noise
        error = (noisy.roll(1, dims=2) + t - (noise - latents)) ** 2
        means[visit.sample.id.split()[0]].append(error.mean())
    instance_loss, prior_loss = (torch.stack(means[name]).mean() for name in ("sample", "other"))
    assert len(means["other"]) == 2
    assert 2 * loss.item() == pytest.approx((instance_loss + weight * prior_loss).item(), rel=1e-6)


# The program


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("harness"), "sd15")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run at two resolutions with regularization images of one caption."""
    folder = tmp_path_factory.mktemp("data")
    write_captioned(folder / "dogs", 8)
    for i in range(3):
        save_image(folder / "others" / f"{i}.jpg", 100 + i, (64, 48))
    own = ["dataset=imagefolder", f"dataset.path={folder / 'dogs'}", "dataset.resolution={32: 1, 64: 2}"]
    more = [f"path={folder / 'others'}", "caption=a dog", "weight=0.5"]
    return [*own, "dataset.caption_dropout=0.2", "dataset.buckets=true"] + [
        f"dataset.regularization.{setting}" for setting in more
    ]


def test_a_killed_run_continues_with_the_same_bits(harness: Harness, settings: list[str]):
    out = harness.new_folder()
    kill = at_call("torch.optim:AdamW.step", 4, raise_signal(signal.SIGKILL))
    assert harness.run(out, *settings, setup=kill).code == -signal.SIGKILL
    folder = harness.finish(out, *settings, "hardware.workers=2")
    assert len(records(folder, "attempt")) == 2
    harness.assert_equals_reference(folder, *settings)
    (attempt, _) = records(folder, "attempt")
    assert "7 samples, 3 for regularization, 1 held out" in attempt["counts"]


def test_check_tells_sizes_and_shares(harness: Harness, settings: list[str]):
    result = harness.run(harness.new_folder(), *settings, "stage=check", "dataset.max_upscale=1.5")
    assert result.code == 0, result.output
    for line in (
        "7 for training, 1 held out",
        "3 for regularization, 50% of each batch: 3.3 visits each, weight 0.5",
        "resolution 32: 11 of 20 visits, by 8 of 10 samples: 7 at 32x32 px, 1 at 40x24 px",
        "resolution 64: 9 of 20 visits, by 3 of 10 samples: 3 at 72x56 px",
        "32x32 px: 1 held out",
        "8 images are too small for the larger resolutions (dataset.max_upscale): ",
    ):
        assert line in result.output, result.output


def test_regularization_images_may_move_but_not_change(harness: Harness, settings: list[str], tmp_path: Path):
    folder = harness.reference(*settings)
    key = "dataset.regularization.path="
    (path,) = (Path(text.removeprefix(key)) for text in settings if text.startswith(key))
    shutil.copytree(path, tmp_path / "moved")
    moved = [*settings, f"{key}{tmp_path / 'moved'}"]
    assert f"{folder} is finished" in harness.run(folder.parent, *moved).output
    save_image(tmp_path / "moved" / "0.jpg", 200, (64, 48))
    result = harness.run(folder.parent, *moved, f"resume={folder.name}")
    assert result.code == 64 and "different data" in result.output, result


def test_regularization_images_may_have_the_layout_of_the_dataset(harness: Harness, folder: Path):
    write_concepts(folder / "data", 4)
    write_concepts(folder / "others", 2)
    own = [
        "dataset=concepts",
        f"dataset.path={folder / 'data'}",
        "dataset.triggers={toy: sks}",
        "dataset.repeats={toy: 2}",
    ]
    more = [f"dataset.regularization.path={folder / 'others'}", "dataset.regularization.share=0.25"]
    run = harness.finish(harness.new_folder(), *own, *more)
    (attempt,) = records(run, "attempt")
    assert "4 for regularization" in attempt["counts"]
    result = harness.run(harness.new_folder(), *own, *more, "stage=check", "steps=null", "epochs=1", "batch=2")
    # One epoch of 7 or more visits at 1.5 visits per step.
    assert result.code == 0 and "25% of each batch" in result.output, result


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["path=FOLDER/missing"], 65, r"dataset.regularization.path=\S+missing: there is no such folder"),
        (["path=FOLDER/empty"], 65, r"dataset.regularization.path=\S+empty: there is no image in it"),
        (["path=FOLDER/empty", "caption=null"], 65, r"dataset.regularization.path=\S+empty: there is no"),
        (["path=FOLDER/dogs"], 64, "one of these folders contains the other"),
        (["path=FOLDER"], 64, "one of these folders contains the other"),
        (["path=null"], 64, "type dataset.regularization.path=FOLDER as well"),
        (["share=1"], 64, "dataset.regularization.share=1 is not a share of a batch"),
        (["weight=0"], 64, "dataset.regularization.weight=0 is not a weight"),
        (["caption=' '"], 64, "dataset.regularization.caption is empty"),
    ],
)
def test_wrong_regularization_is_refused(
    harness: Harness, settings: list[str], changes: list[str], code: int, message: str
):
    (path,) = (Path(text.removeprefix("dataset.path=")) for text in settings if text.startswith("dataset.path="))
    (path.parent / "empty").mkdir(exist_ok=True)
    changes = [f"dataset.regularization.{change.replace('FOLDER', str(path.parent))}" for change in changes]
    result = harness.run(harness.new_folder(), *settings, *changes, "stage=check")
    assert result.code == code and re.search(message, result.output), result
