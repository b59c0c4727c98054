"""Samples, which the readers of all layouts return."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import PurePath

from trainer.dataset.source import Source

MAX_CAPTION_LENGTH = 10_000
"""In characters. Text encoders read a few hundred tokens; a text this long is not a caption."""


@dataclass(slots=True, frozen=True)
class Sample:
    """One image with its caption.

    `split` is "train", "validation" or "test" if the layout defines it, else None. `mask` is an edit mask over the
    image: white where the loss has its full weight, black where it is weighted by `dataset.mask_floor`. `weight`
    multiplies the loss in training. An epoch visits the sample `repeats` times. `texts` are further texts, each with
    its name; see `Dataset.text_fields`. `history` are images that the user liked, with which generated images are
    compared.
    """

    id: str
    image: Source
    caption: str
    controls: tuple[Source, ...] = ()
    split: str | None = None
    mask: Source | None = None
    weight: float = 1.0
    repeats: int = 1
    texts: tuple[tuple[str, str], ...] = ()
    history: tuple[Source, ...] = ()


def control_names(count: int) -> tuple[str, ...]:
    """Returns the names of a sample's control images and of their cached tensors: `control`, `control_2`, ..."""
    return tuple("control" if number == 1 else f"control_{number}" for number in range(1, count + 1))


def sample_id(path: PurePath) -> str:
    """Returns the id of the sample whose image is at this relative path: the path without its suffix."""
    # macOS decomposes file names. One Unicode form gives the same ids, and so the same split, on every machine.
    return unicodedata.normalize("NFC", path.with_suffix("").as_posix())


def check_caption(value: object) -> str:
    """Returns the caption without surrounding white space. Raises ValueError if it is not text, empty or too long."""
    if not isinstance(value, str):
        raise ValueError(f"the caption is {value!r:.40}, not text")
    caption = value.strip()
    if not caption:
        raise ValueError("the caption is empty")
    if len(caption) > MAX_CAPTION_LENGTH:
        raise ValueError(f"the caption has {len(caption)} characters, more than {MAX_CAPTION_LENGTH}")
    return caption
