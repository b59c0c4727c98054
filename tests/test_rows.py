"""Samples of several sizes, with masks and weights, in the batches of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drawn import Noise

from trainer.cache.store import Cache, count_outcomes
from trainer.core.batch import collate, group_by_shape
from trainer.core.rng import normal
from trainer.dataset import Dataset, Sample
from trainer.dataset.view import Transform, TransformedSample
from trainer.model import Recipe
from trainer.objective import Flow
from trainer.training.batches import Batches

TRANSFORM = Transform(((32, 32), (48, 32), (32, 48)))


class Family:
    """What the loader asks of a family."""

    objective = Flow()

    def shift(self, height: int, width: int) -> float:
        return 1.0


def encode(part: str, view: TransformedSample) -> torch.Tensor:
    if part == "mask":
        return torch.full((1, view.height // 8, view.width // 8), 0.5 if view.sample.mask else 1.0)
    pixels = torch.from_numpy(view.picture("image")).permute(2, 0, 1)[:, ::8, ::8].float() / 255
    return torch.full_like(pixels, 0.25) if part == "latents_std" else pixels


def batches(
    samples: list[Sample], folder: Path, parts: tuple[str, ...] = ("latents",), settings: Dataset | None = None, **more
) -> Batches:
    cache = Cache(folder, {name: Recipe(("mask",) if name == "mask" else ("image",), "made here") for name in parts})
    missing = cache.missing([TRANSFORM.apply(sample) for sample in samples])
    count_outcomes(cache.recipes, cache.encode_missing(missing, encode))
    return Batches(samples, cache, Family(), settings or Dataset(), TRANSFORM, seed=0, batch=6, micro_batch=2, **more)


def samples() -> list[Sample]:
    sizes = [(64, 64), (90, 60), (60, 90), (128, 120), (100, 60)]
    return [Sample(f"sample {i}", Noise(f"{i}", *size), "a caption") for i, size in enumerate(sizes)]


def test_a_micro_batch_has_one_size_and_a_step_all_its_samples(tmp_path: Path):
    made = batches(samples(), tmp_path)
    seen = []
    for step in range(1, 6):
        _, micro_batches = made[step]
        assert all(len(rows["t"]) <= 2 and len({tuple(rows["latents"].shape[1:])}) == 1 for rows in micro_batches)
        assert sum(len(rows["t"]) for rows in micro_batches) == 6
        seen += made.ids(step)
    assert {name: seen.count(name) for name in seen} == {sample.id: 6 for sample in samples()}


def test_pictures_take_the_size_whose_ratio_is_nearest():
    assert [(view.width, view.height) for view in map(TRANSFORM.apply, samples())] == [
        (32, 32),
        (48, 32),
        (32, 48),
        (32, 32),
        (48, 32),
    ]


def test_rows_are_filled_up_in_their_first_dimension_only():
    rows = [{"prompt": torch.ones(length, 2), "latents": torch.ones(3, 4, 4)} for length in (3, 5)]
    assert list(group_by_shape(rows, 8)) == [[0, 1]]
    assert collate(rows)["prompt"].shape == (2, 5, 2) and collate(rows)["prompt"][0, 3:].eq(0).all()
    assert list(group_by_shape([*rows, {"prompt": torch.ones(3, 2), "latents": torch.ones(3, 4, 5)}], 8)) == [[0, 1], [2]]


def test_a_mask_and_a_weight_reach_the_loss(tmp_path: Path):
    given = samples()[:2]
    masked = [replace(given[0], mask=Noise("mask", 64, 64)), replace(given[1], weight=3.0)]
    made = batches(masked, tmp_path, ("latents", "mask"), Dataset(mask_floor=0.2), weighted=True)
    weights = [row["weight"].mean().item() for row in (made.row(0, 0), made.row(1, 1))]
    assert weights == pytest.approx([0.2 + 0.8 * 0.5, 3.0])
    flow, clean = Flow(), torch.zeros(2, 4, 2, 2)
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).expand(2, 1, 2, 2)
    assert flow.losses(torch.ones(2, 4, 2, 2), clean, clean, torch.zeros(2), weight).tolist() == [0.25, 0.25]


def test_a_posterior_is_drawn_anew_at_each_visit_and_alike_in_each_run(tmp_path: Path):
    made = batches(samples(), tmp_path, ("latents", "latents_std"))
    first, again, later = made.row(0, 0)["latents"], made.row(0, 0)["latents"], made.row(7, 0)["latents"]
    mean = made.cache.example(made.view(0, 0))["latents"]
    assert torch.equal(first, again) and not torch.equal(first, later)
    torch.testing.assert_close(first, mean + 0.25 * normal(tuple(mean.shape), 0, "posterior", 0, "sample 0"))


def test_a_control_that_is_left_away_is_grey_and_has_an_entry_of_its_own():
    sample = Sample("id", Noise("target", 32, 32), "a caption", (Noise("control", 32, 32),))
    seen, dropped = TRANSFORM.apply(sample), TRANSFORM.apply(sample, drop_control=True)
    assert (
        set(dropped.picture("control").flatten().tolist()) == {127}
        and len(set(seen.picture("control").flatten().tolist())) > 100
    )
    assert seen.content("control") != dropped.content("control") and seen.content("image") == dropped.content("image")


def test_the_geometry_of_a_crop_is_that_of_the_scaled_picture():
    view = TransformedSample(Sample("id", Noise("wide", 200, 100), "a caption"), 48, 48)
    assert view.geometry() == (100, 200, 0, 24, 48, 48)
