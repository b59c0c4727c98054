"""Images in files: checked by their headers, decoded to upright 8-bit sRGB, fitted to a size."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from trainer.core.errors import DataError
from trainer.dataset.buckets import Size
from trainer.dataset.image_formats import PLUGIN_MODULES


def _add_plugins() -> list[str]:
    """Adds the formats of the plugins that are installed to Pillow. Returns their names there."""
    found = []
    if find_spec(PLUGIN_MODULES["pillow-heif"]):
        importlib.import_module("pillow_heif").register_heif_opener()
        found.append("HEIF")
    if find_spec(PLUGIN_MODULES["pillow-jxl-plugin"]):
        importlib.import_module("pillow_jxl")
        found.append("JXL")
    return found


FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", *_add_plugins())
"""Without this list, Pillow would pass a file to Ghostscript (EPS) or HDF5 if its first bytes say so."""
PLUGIN_STARTS = {
    "pillow-heif": [(4, b"ftyp" + brand) for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")],
    "pillow-jxl-plugin": [(0, b"\xff\x0a"), (4, b"JXL ")],
}
"""Package -> position and bytes by which a file of its format is recognized if it is not installed."""
MAX_PIXELS = 178_956_970
"""Half a GiB as RGB. A larger image is a decompression bomb, or a scan that should be made smaller first."""
BAND_HEIGHT = 256
"""In pixels, of the bands in which transparent images are converted."""
MIN_SIDE = 8
"""In pixels. A smaller image is a tracking pixel or a placeholder."""
MAX_ASPECT_RATIO = 8
"""Longer side divided by shorter. A crop of a longer image shows next to nothing of it."""

# Pillow warns above half of MAX_PIXELS; here, an image is either refused or accepted.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@contextmanager
def open_image(file: Path | BytesIO, name: str) -> Iterator[Image.Image]:
    """Opens an image and checks its header.

    Every error, including one raised in the block, becomes an errors.DataError that names the image `name`.
    """
    try:
        if not (os.path.getsize(file) if isinstance(file, Path) else file.getbuffer().nbytes):
            raise ValueError("the file is empty")
        with Image.open(file, formats=FORMATS) as image:
            # A phone's JPEG may contain a preview or depth map (MPO): its first image is the photograph.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise ValueError("it contains several images (an animation, or pages); save one of them to a file")
            check_size(image.size)
            yield image
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{name}: {_describe_non_image(file)}") from None
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    # Pillow's readers raise many kinds of errors for damaged files: OSError, SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        raise DataError(f"{name}: cannot be decoded ({error})") from error


def check_size(size: Size) -> None:
    """Refuses an image by its (width, height), before pixels take memory. Raises ValueError."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS / 1e6:.0f} million; make it smaller")
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width} x {height} pixels are too few; each side needs {MIN_SIDE}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"{width} x {height} pixels are too long and thin (more than {MAX_ASPECT_RATIO} to 1); crop it"
        )


def upright_size(image: Image.Image) -> Size:
    """Returns (width, height) of an opened image after the rotation that EXIF asks for."""
    # Not `image.getexif()`: for a PNG it decodes the pixels to look behind them.
    # For a TIFF, Pillow has swapped the size already.
    turned = image.format != "TIFF" and Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def decode(image: Image.Image) -> Image.Image:
    """Returns the pixels of an opened image as upright RGB.

    Applies the EXIF rotation, composites alpha over white, and converts an embedded profile to sRGB. Raises ValueError
    for 32-bit channels, and whatever Pillow raises for damaged data.
    """
    profile = image.info.get("icc_profile")
    image.load()
    # Otherwise it would return a copy.
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError("it has 32-bit channels, whose value for white is not known; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = _over_white(image)
    if image.mode not in ("L", "CMYK", "RGB"):
        image = image.convert("RGB")
    if profile:
        image = _to_srgb(image, profile)
    # `convert` would copy an image that has this mode already.
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(image: Image.Image, width: int, height: int, flip: bool = False) -> np.ndarray:
    """Returns pixels (height, width, 3) uint8: scaled to just cover the size (Lanczos), cropped at the center, mirrored
    if `flip`.
    """
    pixels = np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    return pixels[:, ::-1].copy() if flip else pixels


def _describe_non_image(file: Path | BytesIO) -> str:
    """Returns a description of a file that Pillow does not recognize."""
    if isinstance(file, Path):
        with open(file, "rb") as stream:
            start = stream.read(512)
    else:
        start = file.getvalue()[:512]
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not an image (a download that failed?)"
    for plugin, starts in PLUGIN_STARTS.items():
        if any(start.startswith(begin, offset) for offset, begin in starts):
            return f"is in a format that is not read; type pip install {plugin}, or save it as .jpg or .png"
    return f"is not an image that can be read ({', '.join(FORMATS)})"


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Converts 16-bit grayscale to 8 bits; `Image.convert` would clip it to white."""
    values = np.asarray(image)
    gray = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _over_white(image: Image.Image) -> Image.Image:
    """Returns an image with transparency over white, as RGB. Works in bands, which take little memory."""
    width, height = image.size
    result = Image.new("RGB", image.size)
    for top in range(0, height, BAND_HEIGHT):
        band = image.crop((0, top, width, min(top + BAND_HEIGHT, height))).convert("RGBA")
        result.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return result


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts from an ICC profile to sRGB.

    Ignores a profile that is broken or made for different channels, as image viewers do.
    """
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space)
        if mode != image.mode or "sRGB" in (source.profile.profile_description or ""):
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError):
        return image
    assert converted is not None  # None is for conversions in place
    return converted
