"""Image files: what is read, how it is decoded, what is refused, and how near duplicates are found."""

from __future__ import annotations

import struct
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import SIZE, decompression_bomb, random_image, save_image
from layouts import write_pairs
from PIL import Image, ImageCms, ImageEnhance

from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.dataset import decoding_memory, image_facts
from trainer.dataset.image import fit
from trainer.dataset.image_facts import find_near_duplicates, inspect_image
from trainer.dataset.pairs import Pairs
from trainer.dataset.sample import Sample
from trainer.dataset.source import FileSource

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
LOSSLESS: dict[str, dict[str, Any]] = {
    "webp": {"lossless": True},
    "jpg": {"quality": 100, "subsampling": 0},
    "avif": {"quality": 100},
}
"""How Pillow saves a format with little or no loss."""


def open_file(path: Path, digests: Digests) -> Image.Image:
    source = FileSource(path, digests)
    image = source.open()
    assert image.mode == "RGB"
    assert image.size == source.size()
    return image


def corners(image: Image.Image) -> list[Any]:
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


def quarters(size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Red, green / blue, white."""
    image = Image.new("RGB", (2, 2))
    image.putdata([RED, GREEN, BLUE, WHITE])
    return image.resize(size, Image.Resampling.NEAREST)


# Decoding


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "bmp", "gif", "jpg", "avif"])
def test_every_format_is_read(suffix: str, tmp_path: Path, digests: Digests):
    path = tmp_path / f"image.{suffix}"
    quarters().save(path, **LOSSLESS.get(suffix, {}))
    np.testing.assert_allclose(corners(open_file(path, digests)), [RED, GREEN, BLUE, WHITE], atol=12)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(suffix: str, orientation: int, tmp_path: Path, digests: Digests):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = quarters() if orientation == 1 else quarters().transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    stored.save(path, exif=exif, **LOSSLESS.get(suffix, {}))
    image = open_file(path, digests)
    assert image.size == (24, 16)
    np.testing.assert_allclose(corners(image), [RED, GREEN, BLUE, WHITE], atol=12)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_is_read_as_ink(suffix: str, tmp_path: Path, digests: Digests):
    path = tmp_path / f"ink.{suffix}"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)
    np.testing.assert_allclose(corners(open_file(path, digests))[0], RED, atol=6)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(suffix: str, tmp_path: Path, digests: Digests):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(32, 0)
    path = tmp_path / f"ramp.{suffix}"
    Image.fromarray(ramp).save(path)
    assert [open_file(path, digests).getpixel((x, 5)) for x in range(256)] == [(x, x, x) for x in range(256)]


def test_sixteen_bits_with_a_transparent_gray_are_composited_over_white(tmp_path: Path, digests: Digests):
    path = tmp_path / "holes.png"
    Image.fromarray(np.full((16, 16), 1000, np.uint16)).save(path)
    data = path.read_bytes()
    at = data.index(b"IDAT") - 4
    body = b"tRNS" + struct.pack(">H", 1000)
    path.write_bytes(data[:at] + struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body)) + data[at:])
    assert corners(open_file(path, digests)) == [WHITE] * 4


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_channels_of_32_bits_are_refused(dtype: type, tmp_path: Path, digests: Digests):
    path = tmp_path / "deep.tif"
    Image.fromarray(np.ones((16, 16), dtype)).save(path)
    with pytest.raises(DataError, match="32-bit channels"):
        FileSource(path, digests).open()


def test_alpha_is_composited_over_white(tmp_path: Path, digests: Digests):
    half = Image.new("RGBA", (16, 16), (*RED, 0))
    half.paste((*BLUE, 255), (8, 0, 16, 16))
    gray = Image.new("LA", (16, 16), (0, 0))
    gray.paste((29, 255), (8, 0, 16, 16))
    images = {
        "rgba.png": half,
        "rgba.webp": half,
        "palette.png": half.quantize(4),
        "palette.gif": half,
        "gray.png": gray,
    }
    for name, image in images.items():
        image.save(tmp_path / name, **LOSSLESS.get(name.rpartition(".")[2], {}))
        left, right, *_ = corners(open_file(tmp_path / name, digests))
        assert left == WHITE, name
        assert right == ((29, 29, 29) if name == "gray.png" else BLUE), name


@pytest.mark.parametrize(("mode", "value", "expected"), [("L", 77, (77, 77, 77)), ("1", 1, WHITE), ("P", 0, (0, 0, 0))])
def test_gray_and_bilevel_and_palette_images_are_read(
    mode: str, value: int, expected: tuple[int, ...], tmp_path: Path, digests: Digests
):
    Image.new(mode, (16, 16), value).save(tmp_path / "image.png")
    assert corners(open_file(tmp_path / "image.png", digests)) == [expected] * 4


def test_embedded_profile_is_converted_to_srgb_and_a_broken_one_ignored(tmp_path: Path, digests: Digests):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The same profile with the red and the blue primary exchanged, under another name: its red is blue.
    swapped = (
        srgb.replace(b"rXYZ", b"tmp_")
        .replace(b"bXYZ", b"rXYZ")
        .replace(b"tmp_", b"bXYZ")
        .replace("sRGB".encode("utf-16-be"), bytes(8))
    )
    profiles = {"srgb": (srgb, RED), "swapped": (swapped, BLUE), "broken": (b"nonsense", RED), "none": (None, RED)}
    for name, (profile, expected) in profiles.items():
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (16, 16), RED).save(path, icc_profile=profile)
        np.testing.assert_allclose(corners(open_file(path, digests))[0], expected, atol=2, err_msg=name)


def test_photograph_of_a_phone_is_read_without_its_preview(tmp_path: Path, digests: Digests):
    path = tmp_path / "phone.jpg"
    preview = random_image(2, (8, 8))
    quarters().save(path, format="MPO", save_all=True, append_images=[preview], quality=100)
    image = open_file(path, digests)
    assert image.size == (24, 16)
    np.testing.assert_allclose(corners(image), [RED, GREEN, BLUE, WHITE], atol=20)


def test_fit_covers_the_size_and_crops_at_the_center():
    wide = Image.new("RGB", (40, 10), GREEN)
    wide.paste(RED, (0, 0, 10, 10))
    wide.paste(BLUE, (30, 0, 40, 10))
    pixels = fit(wide, 16, 16)
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    assert pixels.flags.writeable
    assert (pixels == GREEN).all()
    pixels = fit(wide, 80, 20)
    assert (tuple(pixels[10, 0]), tuple(pixels[10, 79])) == (RED, BLUE)
    np.testing.assert_array_equal(fit(wide, 80, 20, flip=True), pixels[:, ::-1])
    np.testing.assert_array_equal(fit(wide, 40, 10), np.asarray(wide))


# Refused files


@pytest.mark.parametrize(
    ("size", "reason"),
    [((1, 1), "too few"), ((500, 7), "too few"), ((900, 100), "too long and thin"), ((8, 80), "too long and thin")],
)
def test_images_that_are_too_small_or_too_thin_are_refused(
    size: tuple[int, int], reason: str, tmp_path: Path, digests: Digests
):
    Image.new("RGB", size).save(tmp_path / "image.png")
    for action in (FileSource.size, FileSource.open):
        with pytest.raises(DataError, match=f"image.png: {size[0]} x {size[1]} pixels are {reason}"):
            action(FileSource(tmp_path / "image.png", digests))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif", "avif"])
def test_animations_are_refused(suffix: str, tmp_path: Path, digests: Digests):
    path = tmp_path / f"moving.{suffix}"
    random_image(1).save(path, save_all=True, append_images=[random_image(2), random_image(3)])
    with pytest.raises(DataError, match="several images"):
        FileSource(path, digests).size()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><p>404", "is an HTML page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "is not an image that can be read"),
        (b"\x80\x04\x95 a pickle", "is not an image that can be read"),
        (b"\xff\xd8\xff", "."),
        (b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR", "."),
    ],
)
def test_files_that_are_no_images_are_described(data: bytes, reason: str, tmp_path: Path, digests: Digests):
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"image.jpg: .*{reason}"):
        FileSource(path, digests).size()


def test_missing_file_is_a_data_error(tmp_path: Path, digests: Digests):
    with pytest.raises(DataError, match="No such file"):
        FileSource(tmp_path / "image.jpg", digests).open()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif", "bmp"])
def test_truncated_image_is_refused_when_it_is_decoded(suffix: str, tmp_path: Path, digests: Digests):
    path = tmp_path / f"image.{suffix}"
    noise = np.random.Generator(np.random.Philox(1)).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"image.{suffix}: "):
        FileSource(path, digests).open()


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some formats decode an image when they are imported.
    Image.init()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))


@pytest.mark.parametrize("size", [(60_000, 60_000), (13_378, 13_378)])
@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_decompression_bomb_is_refused_by_its_header(
    size: tuple[int, int],
    pillow_limit: int | None,
    tmp_path: Path,
    digests: Digests,
    monkeypatch: pytest.MonkeyPatch,
):
    forbid_decoding(monkeypatch)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    path = tmp_path / "bomb.png"
    path.write_bytes(decompression_bomb(*size))
    for action in (FileSource.size, FileSource.open):
        with warnings.catch_warnings(), pytest.raises(DataError, match=r"bomb.png: .*(179 million|178956970)"):
            warnings.simplefilter("ignore")
            action(FileSource(path, digests))


def test_reading_a_dataset_reads_only_headers(folder: Path, digests: Digests, monkeypatch: pytest.MonkeyPatch):
    write_pairs(folder, 2)
    forbid_decoding(monkeypatch)
    monkeypatch.setattr(Digests, "sha256", lambda self, path: pytest.fail("bytes were hashed"))
    assert len(Pairs(path=str(folder)).read(digests).samples) == 2


# Digests and facts


def test_digest_depends_on_the_bytes_and_not_on_the_name(tmp_path: Path, digests: Digests):
    save_image(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    save_image(tmp_path / "c.png", 2)
    a, b, c = (FileSource(tmp_path / f"{name}.png", digests).digest() for name in "abc")
    assert a == b != c
    assert len(a) == 64


def test_near_duplicates_are_found_and_similar_images_are_not(tmp_path: Path, digests: Digests):
    big = random_image(1, (320, 256)).resize((320, 256), Image.Resampling.BICUBIC)
    images = {
        "original": big,
        "smaller": big.resize((150, 120)),
        "brighter": ImageEnhance.Brightness(big).enhance(1.05),
        "other": random_image(2, (320, 256)),
        "mirrored": big.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "red": Image.new("RGB", (64, 64), "red"),
        "blue": Image.new("RGB", (64, 64), "blue"),
    }
    facts = []
    for name, image in images.items():
        image.save(tmp_path / f"{name}.jpg", quality=60)
        facts.append(inspect_image(FileSource(tmp_path / f"{name}.jpg", digests)))
    assert find_near_duplicates(facts) == [[0, 1, 2]]


def test_facts_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Digests, "_RACY", 0)
    path = save_image(tmp_path / "a.png", 1)
    source = FileSource(path, Digests(tmp_path / "digests"))
    first = inspect_image(source)
    assert first.fault is None and first.edges
    source.digests.flush()
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "open", lambda self: pytest.fail("it was decoded again"))
        assert inspect_image(FileSource(path, Digests(tmp_path / "digests"))) == first
    path.write_bytes(b"<html>")
    changed = inspect_image(FileSource(path, Digests(tmp_path / "digests")))
    assert changed.fault is not None
    assert "is an HTML page" in changed.fault and str(path) not in changed.fault


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each image needs more than half of the limit."""
    monkeypatch.setattr(decoding_memory, "LIMIT", 1.5 * decoding_memory.BYTES_PER_PIXEL * SIZE[0] * SIZE[1])
    active, most = 0, 0

    class Watched(FileSource):
        def open(self) -> Image.Image:
            nonlocal active, most
            active, most = active + 1, max(most, active + 1)
            time.sleep(0.01)
            image = FileSource.open(self)
            active -= 1
            return image

    digests = Digests(tmp_path / "digests.sqlite")
    samples = [Sample(str(i), Watched(save_image(tmp_path / f"{i}.png", i), digests), "a") for i in range(4)]
    assert len(image_facts.inspect_images(samples, iter)) == 4
    assert most == 1


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_images_over_white_are_the_same_in_bands_as_at_once(mode: str, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (600, 90, 4), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "a.png")
    layer = image.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    source = FileSource(tmp_path / "a.png", Digests(tmp_path / "digests.sqlite"))
    assert np.array_equal(np.asarray(source.open()), np.asarray(whole))
