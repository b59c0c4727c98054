"""Which sizes there are for pictures of several shapes, which one a picture takes, and what near duplicates are told by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts import drawing, save
from PIL import Image, ImageEnhance

from trainer import dataset
from trainer.core.errors import UsageError
from trainer.core.files import Digests
from trainer.dataset import ImageFolder, Sample
from trainer.dataset.buckets import enlargement, made, nearest
from trainer.dataset.picture import FileSource
from trainer.dataset.survey import inspect, near_duplicates


@pytest.mark.parametrize(
    ("side", "multiple", "ratio"), [(1024, 16, 2.0), (1024, 64, 4.0), (512, 8, 2.0), (64, 8, 1.5), (768, 32, 1.0)]
)
def test_buckets_have_no_more_pixels_than_the_square_and_sides_that_the_model_takes(
    side: int, multiple: int, ratio: float
):
    sizes = made(side, side, multiple, ratio)
    assert (side, side) in sizes
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert width * height <= side * side
        assert max(width, height) <= ratio * min(width, height)
        assert (height, width) in sizes
    # None could be higher.
    step = multiple * max(1, round(side / 16 / multiple))
    assert all((height + step) * width > side * side or height + step > ratio * width for width, height in sizes)


def test_the_buckets_of_a_thousand_pixels_are_those_that_are_known():
    assert {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1152, 896), (1216, 832), (1344, 768)} <= set(
        made(1024, 1024, 16, 2.0)
    )
    assert {(640, 1600), (1600, 640), (512, 2048)} <= set(made(1024, 1024, 16, 4.0))
    assert (832, 576) in made(832, 576, 16, 2.0)
    assert made(832, 576, 16, 1.0) == ((672, 672), (832, 576))


def test_a_picture_takes_the_nearest_shape_whatever_its_size():
    sizes = made(64, 64, 8, 2.0)
    assert nearest((4000, 4000), sizes) == nearest((9, 9), sizes) == (64, 64)
    for width, height in sizes:
        assert nearest((10 * width, 10 * height), sizes) == (width, height)
    assert nearest((1000, 300), sizes)[0] > nearest((1000, 300), sizes)[1]
    assert nearest((100, 100), [(32, 32), (64, 64)]) == (64, 64)
    assert enlargement((32, 64), (64, 64)) == 2 and enlargement((640, 128), (64, 64)) == 0.5


def test_buckets_are_made_or_named_and_must_suit_the_model(tmp_path: Path):
    digests = Digests(tmp_path / "d")
    wide, square = (
        FileSource(save(tmp_path / f"{i}.png", i, size), digests) for i, size in enumerate(((80, 40), (50, 50)))
    )
    transform = dataset.transform(ImageFolder(resolution=64, buckets=True), 8)
    views = [transform.apply(Sample(str(i), source, "x")) for i, source in enumerate((wide, square))]
    assert [(view.width, view.height) for view in views] == [nearest((80, 40), transform.sizes), (64, 64)]
    assert views[0].pixels().shape == (views[0].height, views[0].width, 3)
    assert dataset.transform(ImageFolder(resolution=64, buckets=["64x32", "32"]), 8).sizes == ((64, 32), (32, 32))
    assert dataset.transform(ImageFolder(resolution=64), 8).sizes == ((64, 64),)
    with pytest.raises(
        UsageError, match=r"dataset.buckets=60x32: .* divisible by 8; type dataset.buckets=\[...,64x32\]"
    ):
        dataset.transform(ImageFolder(resolution=64, buckets=["60x32"]), 8)
    for wrong in (
        {"buckets": "x"},
        {"buckets": ["1*2"]},
        {"buckets": []},
        {"bucket_ratio": 0.5},
        {"max_upscale": 0.5},
        {"on_fault": "go"},
    ):
        with pytest.raises(UsageError, match=f"dataset.{next(iter(wrong))}"):
            ImageFolder(**wrong)


def test_near_duplicates_survive_scaling_saving_and_brightness_and_others_are_not_taken_for_them(tmp_path: Path):
    digests = Digests(tmp_path / "d")
    big = drawing(1, (320, 256)).resize((320, 256), Image.Resampling.BICUBIC)
    kinds = {
        "a": big,
        "b": big.resize((150, 120)),
        "c": ImageEnhance.Brightness(big).enhance(1.05),
        "other": drawing(2, (320, 256)),
        "mirrored": big.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "red": Image.new("RGB", (64, 64), "red"),
        "blue": Image.new("RGB", (64, 64), "blue"),
    }
    facts = []
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.jpg", quality=60)
        facts.append(inspect(FileSource(tmp_path / f"{name}.jpg", digests)))
    assert near_duplicates(facts) == [[0, 1, 2]]


def test_what_a_picture_was_found_to_be_is_remembered_until_it_changes(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Digests, "_RACY", 0)
    path = save(tmp_path / "a.png", 1)
    source = FileSource(path, Digests(tmp_path / "d"))
    first = inspect(source)
    source.digests.flush()
    with monkeypatch.context() as patched:
        patched.setattr(FileSource, "open", lambda self: pytest.fail("it was decoded again"))
        assert inspect(FileSource(path, Digests(tmp_path / "d"))) == first
    path.write_bytes(b"<html>")
    changed = inspect(FileSource(path, Digests(tmp_path / "d")))
    assert "is an HTML page" in changed.fault and str(path) not in changed.fault
    assert np.any([first.edges]) and first.fault is None
