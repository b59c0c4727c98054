"""The layout arrays: train_images.npy (N, H, W, 3) uint8 with train_descriptions.npy (N,), and test_* to judge by, read from the disk as needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from trainer.core.errors import DataError
from trainer.core.files import Digests, storage
from trainer.dataset.picture import judge
from trainer.dataset.reading import VALIDATION, Listing, Reading, roles
from trainer.dataset.sample import Sample, caption, inside

if TYPE_CHECKING:
    from trainer.dataset import Arrays

IMAGES, TEXTS = "images", "descriptions"


@dataclass(slots=True, frozen=True)
class Slice:
    """One picture of an array of pictures; see `trainer.dataset.sample.Source`."""

    path: Path
    index: int
    shape: tuple[int, int]
    """(width, height)"""
    digests: Digests = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.path}[{self.index}]"

    def digest(self) -> str:
        return self.remember("", lambda: hashlib.sha256(self._pixels().tobytes()).hexdigest())

    def remember(self, what: str, make: Callable[[], str]) -> str:
        return self.digests.remembered(self.path, f"[{self.index}]{what}", make)

    def size(self) -> tuple[int, int]:
        return self.shape

    def open(self) -> Image.Image:
        return Image.fromarray(self._pixels())

    def _pixels(self) -> np.ndarray:
        # Mapped anew, for what was read through a mapping counts as memory of the process as long as it lasts.
        return np.array(_mapped(self.path)[self.index])


def _mapped(path: Path) -> np.ndarray:
    """The array in a file, which the system reads as it is asked for. Nothing pickled is read. Raises errors.DataError."""
    _refuse_objects(path)
    with storage("read", path):
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot be read as an array ({error})") from None


def _refuse_objects(path: Path) -> None:
    """Read the header alone, for an array of objects is a pickle, which may run anything."""
    with storage("read", path), open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            dtype = header(file)[2]
        except ValueError as error:
            raise DataError(f"{path}: is not a .npy file ({error})") from None
    if dtype.hasobject:
        command = f"import numpy as np; np.save('{path}', np.load('{path}', allow_pickle=True).astype(str))"
        raise DataError(
            f"{path}: holds Python objects (dtype {dtype}), which loading would execute. If you trust the file, convert it once:\n"
            f'  python -c "{command}"'
        )


def read(settings: Arrays, digests: Digests) -> Listing:
    """One sample an entry; where there is a test_ (or validation_, val_) array it is what the run is judged by, and nothing else is held out.

    Raises errors.DataError where an array is missing or is not what it should be.
    """
    reading = Reading(settings.folder(), digests)
    there = [name for name in ("train", *VALIDATION) if (reading.root / f"{name}_{IMAGES}.npy").exists()]
    if "train" not in there:
        raise DataError(
            f"dataset.path={settings.path}: there is no train_{IMAGES}.npy in it, uint8 (N, H, W, 3), with train_{TEXTS}.npy (N,)."
        )
    for name, split in roles(reading, there).items():
        _side(reading, name, split)
    return reading.listing()


def _side(reading: Reading, name: str, split: str | None) -> None:
    paths = [reading.root / f"{name}_{part}.npy" for part in (IMAGES, TEXTS)]
    for path in paths:
        if not inside(reading.root, path):
            raise DataError(f"{path}: is a link out of the data set's folder; put the file itself there")
    images, texts = (_mapped(path) for path in paths)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"{paths[0]}: is {images.dtype} {images.shape}, where pictures are uint8 (N, height, width, 3)")
    if texts.ndim != 1 or texts.dtype.kind not in "US":
        raise DataError(f"{paths[1]}: is {texts.dtype} {texts.shape}, where descriptions are text (N,)")
    if len(images) != len(texts):
        raise DataError(
            f"{paths[0].name} has {len(images)} pictures and {paths[1].name} {len(texts)} descriptions; each picture needs one"
        )
    shape = images.shape[2], images.shape[1]
    try:
        judge(shape)
    except ValueError as error:
        raise DataError(f"{paths[0]}: {error}") from None
    for index in range(len(images)):
        reading.found += 1
        text = reading.tried(f"{paths[1].name}[{index}]", lambda index=index: caption(_text(texts[index])))
        if text is not None:
            reading.add(
                Sample(f"{name}-{index:08d}", Slice(paths[0], index, shape, reading.digests), text, split=split), name
            )


def _text(value: np.str_ | np.bytes_) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
