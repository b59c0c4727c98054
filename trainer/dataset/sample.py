"""What every data set is read as, and the checks that all readers share."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

FAULTS_LISTED = 20
"""Of many faults the first are shown; stage=check lists all."""
LONGEST_CAPTION = 10_000
"""Characters; text encoders read some hundred tokens, so what is longer is another file's text."""


class Task(Enum):
    """What a model is taught on the demo world: to change a control picture by instruction, or to draw what a caption describes."""

    edit = "edit"
    describe = "describe"


class Source(Protocol):
    """One picture, wherever it is. Sources are hashable, and equal where they name the same picture."""

    @property
    def name(self) -> str:
        """How messages call it: a path, or "demo 17 target"."""

    def digest(self) -> str:
        """Hex sha256 of the picture's content, never of its name."""

    def remember(self, what: str, make: Callable[[], str]) -> str:
        """`make()`, which tells something of the picture's content, asked for once as long as the content stays as it is."""

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels as `open` gives them, from the header alone. Raises errors.DataError."""

    def open(self) -> Image:
        """The picture decoded: 8-bit sRGB, upright, alpha laid over white. Raises errors.DataError."""


@dataclass(slots=True, frozen=True)
class Sample:
    """One training example; `split` is "train", "validation" or "test" where the layout says so itself.

    `mask` is an edit mask over the target: white where the loss counts fully, black where `dataset.mask_floor` of it counts. `weight` multiplies
    the loss in training, `repeats` are visits an epoch.
    """

    id: str
    image: Source
    caption: str
    controls: tuple[Source, ...] = ()
    split: str | None = None
    mask: Source | None = None
    weight: float = 1.0
    repeats: int = 1


@dataclass(slots=True)
class Split:
    """`test`: what the layout keeps for the end. No run trains on it or is judged by it; `stage=sample` draws it where it is asked to."""

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample] = field(default_factory=list)


def identify(path: PurePath) -> str:
    """The id of the sample whose target lies at this relative path: the path without its ending."""
    # One Unicode form, for macOS decomposes file names: the same data set splits alike everywhere.
    return unicodedata.normalize("NFC", path.with_suffix("").as_posix())


def caption(value: object) -> str:
    """The caption without white space around it. Raises ValueError with the reason where it is none."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            "the caption is empty" if isinstance(value, str) else f"the caption is {value!r:.40}, not text"
        )
    text = value.strip()
    if len(text) > LONGEST_CAPTION:
        raise ValueError(f"the caption has {len(text)} characters, more than {LONGEST_CAPTION}")
    return text


def relative(name: object) -> PurePosixPath:
    """A file name out of a data set's table. Raises ValueError with the reason where it could lead out of the data set's folder."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{name!r:.40} names no file")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or re.match("[A-Za-z]:", name):
        raise ValueError(
            f"{name!r:.80} may lead out of the data set's folder; names are relative to it, with / between folders"
        )
    if re.search("[\0-\x1f\ud800-\udfff]", name):
        raise ValueError(f"{name!r:.80} holds characters that no file name has")
    return path


def inside(folder: Path, path: Path) -> bool:
    """Whether `path` lies in `folder` once all links are followed; opens nothing."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
