"""Aspect ratio buckets, and the transforms that use them."""

from __future__ import annotations

from pathlib import Path

import pytest
from images import save_image

from trainer.core.digests import Digests
from trainer.core.errors import UsageError
from trainer.dataset.buckets import make_buckets, nearest_bucket, upscale_factor
from trainer.dataset.imagefolder import ImageFolder
from trainer.dataset.sample import Sample
from trainer.dataset.source import FileSource
from trainer.dataset.transform import build_transform


@pytest.mark.parametrize(
    ("side", "multiple", "ratio"), [(1024, 16, 2.0), (1024, 64, 4.0), (512, 8, 2.0), (64, 8, 1.5), (768, 32, 1.0)]
)
def test_buckets_have_at_most_the_pixels_of_the_square(side: int, multiple: int, ratio: float):
    sizes = make_buckets(side, side, multiple, ratio)
    assert (side, side) in sizes
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert width * height <= side * side
        assert max(width, height) <= ratio * min(width, height)
        assert (height, width) in sizes
    # No bucket could be higher.
    step = multiple * max(1, round(side / 16 / multiple))
    assert all((height + step) * width > side * side or height + step > ratio * width for width, height in sizes)


def test_buckets_at_1024_pixels_are_the_usual_ones():
    usual = {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1152, 896), (1216, 832), (1344, 768)}
    assert usual <= set(make_buckets(1024, 1024, 16, 2.0))
    assert {(640, 1600), (1600, 640), (512, 2048)} <= set(make_buckets(1024, 1024, 16, 4.0))
    assert (832, 576) in make_buckets(832, 576, 16, 2.0)
    assert make_buckets(832, 576, 16, 1.0) == ((672, 672), (832, 576))


def test_nearest_bucket_depends_on_the_aspect_ratio_only():
    sizes = make_buckets(64, 64, 8, 2.0)
    assert nearest_bucket((4000, 4000), sizes) == nearest_bucket((9, 9), sizes) == (64, 64)
    for width, height in sizes:
        assert nearest_bucket((10 * width, 10 * height), sizes) == (width, height)
    width, height = nearest_bucket((1000, 300), sizes)
    assert width > height
    assert nearest_bucket((100, 100), [(32, 32), (64, 64)]) == (64, 64)


def test_upscale_factor_is_that_of_covering_the_size():
    assert upscale_factor((32, 64), (64, 64)) == 2
    assert upscale_factor((640, 128), (64, 64)) == 0.5


def test_transform_resizes_each_image_to_the_nearest_bucket(tmp_path: Path, digests: Digests):
    transform = build_transform(ImageFolder(resolution="64", buckets=True), 8)
    transformed = []
    for name, size in (("wide", (80, 40)), ("square", (50, 50))):
        source = FileSource(save_image(tmp_path / f"{name}.png", 1, size), digests)
        transformed.append(transform.apply(Sample(name, source, "x")))
    wide, square = transformed
    assert (wide.width, wide.height) == nearest_bucket((80, 40), transform.sizes)
    assert (square.width, square.height) == (64, 64)
    assert wide.pixels().shape == (wide.height, wide.width, 3)


def test_transform_uses_the_sizes_of_the_settings():
    assert build_transform(ImageFolder(resolution="64"), 8).sizes == ((64, 64),)
    listed = ImageFolder(resolution="64", buckets=["64x32", "32"])
    assert build_transform(listed, 8).sizes == ((64, 32), (32, 32))
    with pytest.raises(UsageError, match=r"dataset.resolution=60: .* type dataset.resolution=\[...,64\]"):
        build_transform(ImageFolder(resolution=[32, 60]), 8)
    refused = r"dataset.buckets=60x32: .* divisible by 8; type dataset.buckets=\[...,64x32\]"
    with pytest.raises(UsageError, match=refused):
        build_transform(ImageFolder(resolution="64", buckets=["60x32"]), 8)
