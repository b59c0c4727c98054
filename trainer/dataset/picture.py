"""Pictures in files: judged by their headers, decoded to upright 8-bit sRGB, fitted to a size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from trainer.core.errors import DataError
from trainer.core.files import Digests

# Named, for Pillow would also hand a file to Ghostscript (EPS) or HDF5 if its first bytes ask for that.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif")
LARGEST = 178_956_970
"""Pixels; decoded as RGB half a GiB. What is larger is a decompression bomb, or a scan to be made smaller first."""
SMALLEST = 8
"""Pixels a side; what is smaller is a tracking pixel or a placeholder."""
STEEPEST = 8
"""Longer side over shorter; a crop of what is steeper shows next to nothing of it."""

# Pillow warns from half of LARGEST on; here a picture is refused or it is not.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(slots=True, frozen=True)
class FileSource:
    """A picture in a file; see `trainer.dataset.sample.Source`."""

    path: Path
    digests: Digests = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return str(self.path)

    def digest(self) -> str:
        return self.digests.of(self.path)

    def remember(self, what: str, make: Callable[[], str]) -> str:
        return self.digests.remembered(self.path, what, make)

    def size(self) -> tuple[int, int]:
        """(width, height) as `open` gives them; a PNG whose EXIF block follows its pixels counts as upright here."""
        with opened(self.path, self.name) as image:
            return upright_size(image)

    def open(self) -> Image.Image:
        with opened(self.path, self.name) as image:
            return decode(image)


@contextmanager
def opened(file: Path | BytesIO, name: str) -> Iterator[Image.Image]:
    """A picture whose header has been judged. Raises one errors.DataError that calls it `name`, also for what is raised in the block."""
    try:
        if not (os.path.getsize(file) if isinstance(file, Path) else file.getbuffer().nbytes):
            raise ValueError("the file is empty")
        with Image.open(file, formats=FORMATS) as image:
            # A phone's JPEG may carry a preview or depth map (MPO): its first picture is the photograph.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise ValueError("it holds several pictures (an animation, or pages); save the one that is meant")
            judge(image.size)
            yield image
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{name}: {_what_else(file)}") from None
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    except (
        Exception
    ) as error:  # Pillow's readers raise whatever they stumble over: OSError, SyntaxError, struct.error, KeyError, ...
        raise DataError(f"{name}: cannot be decoded ({error})") from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened picture once it is turned as EXIF says."""
    # Not `image.getexif()`: that of a PNG decodes the pixels to look behind them. Pillow has turned a TIFF's size already.
    turned = image.format != "TIFF" and Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def decode(image: Image.Image) -> Image.Image:
    """An opened picture's pixels: mode RGB, turned as EXIF says, alpha over white, an embedded colour profile brought to sRGB.

    Raises ValueError for samples of 32 bits, and whatever Pillow raises for damaged data.
    """
    profile = image.info.get("icc_profile")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError("it has 32-bit samples, and which value is white is not known; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    return (_to_srgb(image, profile) if profile else image).convert("RGB")


def fit(image: Image.Image, width: int, height: int, flip: bool = False) -> np.ndarray:
    """Pixels (height, width, 3) uint8: scaled to just cover the size (Lanczos), cut at the centre, mirrored if `flip`."""
    pixels = np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    return pixels[:, ::-1].copy() if flip else pixels


def judge(size: tuple[int, int]) -> None:
    """Refuse by (width, height) alone, before any pixel takes memory. Raises ValueError."""
    width, height = size
    if width * height > LARGEST:
        raise ValueError(f"{width} x {height} pixels are more than {LARGEST / 1e6:.0f} million; make it smaller")
    if min(width, height) < SMALLEST:
        raise ValueError(f"{width} x {height} pixels are too few; each side needs {SMALLEST}")
    if max(width, height) > STEEPEST * min(width, height):
        raise ValueError(f"{width} x {height} pixels are too long and thin (more than {STEEPEST} to 1); crop it")


def _what_else(file: Path | BytesIO) -> str:
    """What a file is that is no picture."""
    if isinstance(file, Path):
        with open(file, "rb") as stream:
            start = stream.read(512)
    else:
        start = file.getvalue()[:512]
    start = start.lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not a picture (a download that failed?)"
    return f"is not a picture that can be read ({', '.join(FORMATS)})"


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; `convert` would clip it to white."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours as the embedded ICC profile means them; a profile that is broken or for other channels is ignored, as viewers do."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space)
        if space != image.mode or "sRGB" in (source.profile.profile_description or ""):
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError):
        return image
