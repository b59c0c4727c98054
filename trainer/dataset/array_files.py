"""NumPy files of images and descriptions, mapped into memory so that only the entries in use are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.core.files import library_errors
from trainer.dataset.buckets import Size
from trainer.dataset.image import check_size
from trainer.dataset.sample import check_caption


@dataclass(slots=True, frozen=True)
class ArraySource:
    """One image of an array of images; see `trainer.dataset.source.Source`."""

    path: Path
    index: int
    image_size: Size
    digests: Digests = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.path}[{self.index}]"

    def digest(self) -> str:
        return self.memoize("", lambda: hashlib.sha256(self._pixels().tobytes()).hexdigest())

    def memoize(self, key: str, compute: Callable[[], str]) -> str:
        return self.digests.get_or_compute(self.path, f"[{self.index}]{key}", compute)

    def size(self) -> Size:
        return self.image_size

    def open(self) -> Image.Image:
        return Image.fromarray(self._pixels())

    def _pixels(self) -> np.ndarray:
        # Mapped anew each time: pages that were read count as memory of the process as long as the mapping exists.
        return np.array(_open_array(self.path)[self.index])


def image_sources(path: Path, digests: Digests) -> list[ArraySource]:
    """Returns the images of a file with an array (N, H, W, 3) uint8. Raises errors.DataError."""
    images = _open_array(path)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"{path}: is {images.dtype} {images.shape}, but images are uint8 (N, height, width, 3)")
    size = images.shape[2], images.shape[1]
    try:
        check_size(size)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    return [ArraySource(path, index, size, digests) for index in range(len(images))]


def open_descriptions(path: Path) -> np.ndarray:
    """Returns the array (N,) of strings in a file. Raises errors.DataError."""
    texts = _open_array(path)
    if texts.ndim != 1 or texts.dtype.kind not in "US":
        raise DataError(f"{path}: is {texts.dtype} {texts.shape}, but descriptions are text (N,)")
    return texts


def read_description(descriptions: np.ndarray, index: int) -> str:
    """Returns one description. Raises ValueError."""
    value = descriptions[index]
    return check_caption(value.decode() if isinstance(value, bytes) else str(value))


def _open_array(path: Path) -> np.ndarray:
    """Maps the array in a file into memory. Never unpickles anything. Raises errors.DataError."""
    _refuse_objects(path)
    with library_errors(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def _refuse_objects(path: Path) -> None:
    """Refuses an array of Python objects by its header: it is a pickle, which could run any code."""
    with library_errors(path, "It must be a .npy file"), open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        dtype = header(file)[2]
    if dtype.hasobject:
        command = f"import numpy as np; np.save('{path}', np.load('{path}', allow_pickle=True).astype(str))"
        raise DataError(
            f"{path}: contains Python objects (dtype {dtype}), and loading them would execute code. "
            f'If you trust the file, convert it once:\n  python -c "{command}"'
        )
