"""Config group `dataset`: the settings that all layouts share.

A layout is one way to arrange images and captions on disk. Each has one module here, with its settings class and its
reader, and one file in `conf/dataset/`: `pairs.py` and `pairs.yaml`, for example.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from trainer.core.errors import DataError, UsageError
from trainer.core.settings import added, path_setting
from trainer.dataset.regularization import Regularization

if TYPE_CHECKING:
    from trainer.core.digests import Digests
    from trainer.dataset.buckets import Size
    from trainer.dataset.listing import Listing


DEFAULT_TAG_ORDERS = 4


@dataclass(slots=True)
class Dataset:
    """Base class of the settings of a layout. `conf/dataset.yaml` explains the settings that all layouts share."""

    path: str | None = path_setting(None)
    resolution: Any = None
    validation_fraction: float = 0.15
    limit: int | None = None
    on_fault: str = "stop"
    caption_dropout: float = 0.0
    control_dropout: float = 0.0
    control_resolution: str | None = None
    mask_floor: float = 0.1
    flip: bool = False
    buckets: Any = False
    bucket_ratio: float = 2.0
    max_upscale: float | None = None
    regularization: Regularization = added(default_factory=Regularization)
    shuffle_tags: bool = added(False)
    keep_tags: int = added(0)
    tag_orders: int = added(DEFAULT_TAG_ORDERS)

    generated: ClassVar[bool] = False
    """Whether the program generates the images itself, so that none can be damaged."""

    @property
    def text_fields(self) -> tuple[str, ...]:
        """Names of the texts that samples have besides the caption. Each is a setting of the layout."""
        return ()

    def __post_init__(self) -> None:
        self._check_sizes()
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(
                f"dataset.validation_fraction={self.validation_fraction} is not a share of the samples: type 0 to 0.99."
            )
        for name in ("caption_dropout", "control_dropout", "mask_floor"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UsageError(
                    f"dataset.{name}={value} is not between 0 and 1; type a number such as dataset.{name}=0.1."
                )
        self._check_tags()
        if self.on_fault not in ("stop", "skip"):
            raise UsageError(f"dataset.on_fault={self.on_fault} is unknown: type stop or skip.")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"dataset.limit={self.limit} leaves no samples: type 1 or more, or null for all.")

    def _check_tags(self) -> None:
        if not self.shuffle_tags and (self.keep_tags or self.tag_orders != DEFAULT_TAG_ORDERS):
            raise UsageError(
                "dataset.keep_tags and dataset.tag_orders have no effect without dataset.shuffle_tags=true: type it as "
                "well, or leave them out."
            )
        if self.keep_tags < 0:
            raise UsageError(f"dataset.keep_tags={self.keep_tags} is not a number of tags: type 0 or more, such as 1.")
        if self.tag_orders < 2:
            raise UsageError(
                f"dataset.tag_orders={self.tag_orders} shuffles nothing: type 2 or more, such as "
                f"{DEFAULT_TAG_ORDERS}, or dataset.shuffle_tags=false."
            )

    def _check_sizes(self) -> None:
        self.resolution = _spell_resolutions(self.resolutions())
        if self.control_resolution is not None:
            parse_size("control_resolution", self.control_resolution)
        if not isinstance(self.buckets, bool | list) or self.buckets == []:
            raise UsageError(
                f"dataset.buckets={self.buckets} is unknown: "
                "type true, false, or a list of sizes such as [1024x1024,832x1216]."
            )
        for size in self.buckets if isinstance(self.buckets, list) else ():
            parse_size("buckets", size)
        if isinstance(self.buckets, list) and len(self.resolutions()) > 1:
            raise UsageError(
                f"dataset.buckets={self.buckets} lists the sizes of one resolution, but dataset.resolution has "
                f"{len(self.resolutions())}: type dataset.buckets=true, or leave out dataset.resolution."
            )
        if self.bucket_ratio < 1:
            raise UsageError(
                f"dataset.bucket_ratio={self.bucket_ratio:g} is below 1, "
                "but it is the longer side divided by the shorter: type 1 or more."
            )
        if self.max_upscale is not None and self.max_upscale < 1:
            raise UsageError(
                f"dataset.max_upscale={self.max_upscale:g} is below 1, the size of the image itself: "
                "type 1 or more, or null for no limit."
            )

    def resolutions(self) -> dict[Size, float]:
        """Returns the relative share of visits of each resolution, (width, height) in pixels, the smallest first.

        Empty for the model's own resolution. Raises errors.UsageError.
        """
        value = self.resolution
        if value is None:
            return {}
        if not isinstance(value, list | dict):
            value = [value]
        weights = value if isinstance(value, dict) else dict.fromkeys(map(str, value), 1.0)
        sizes = {parse_size("resolution", text): _check_weight(text, weight) for text, weight in weights.items()}
        if not value or len(sizes) < len(value):
            raise UsageError(
                f"dataset.resolution={value}: type different sizes such as [512,1024], or sizes with their shares of "
                "the visits such as {512: 1, 1024: 3}."
            )
        return dict(sorted(sizes.items(), key=lambda item: (item[0][0] * item[0][1], item[0])))

    def size(self) -> Size | None:
        """Returns the largest resolution as (width, height) in pixels; None for the model's own."""
        return next(reversed(self.resolutions()), None)

    def resolve(self, resolution: int, has_controls: bool) -> Self:
        """Returns the settings with values in place of nulls that depend on the model.

        `resolution` is the model's own, in pixels. `has_controls`: whether the model takes control images.
        """
        return self if self.resolution is not None else replace(self, resolution=resolution)

    def for_regularization(self) -> Self:
        """Returns the settings that read the regularization images, if these have the layout of the dataset.

        Without those that only make sense for the dataset itself. Raises errors.UsageError.
        """
        return replace(self, path=self.regularization.path, regularization=Regularization())

    def require_folder(self) -> Path:
        """Returns the folder of the dataset.

        Raises errors.UsageError if `path` is not set, errors.DataError if the folder does not exist.
        """
        if not self.path:
            raise UsageError("This dataset needs a folder: type dataset.path=FOLDER.")
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"dataset.path={self.path}: there is no such folder (looked for {folder.absolute()}). "
                "Type the path of a folder that exists."
            )
        return folder

    def describe(self) -> str:
        """Returns the name of the dataset for messages."""
        return f"dataset.path={self.path}"

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Returns all samples, in any order, and all faults. Reads the headers of images, but decodes none.

        `ignored` are folders that are not part of the dataset, although they may lie in its folder: those that the
        program itself writes to.

        Raises errors.UsageError for settings that do not fit the folder, errors.DataError if the folder does not have
        this layout.
        """
        raise NotImplementedError


def parse_size(key: str, text: object) -> Size:
    """Parses the setting `dataset.<key>`: "1024" is a square, "832x576" is width x height. Raises errors.UsageError."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", str(text))
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not width or not height:
        raise UsageError(
            f"dataset.{key}={text} is not a size: type 1024 for a square, or width x height such as 832x576."
        )
    return width, height


def size_name(size: Size) -> str:
    """Returns the setting of a size. A square has one spelling, because it is part of the identity of a run."""
    width, height = size
    return str(width) if width == height else f"{width}x{height}"


def _check_weight(text: object, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UsageError(
            f"dataset.resolution: {weight} is not a share of the visits at {text}; type a number above 0, as in "
            "{512: 1, 1024: 3}."
        )
    return float(weight)


def _spell_resolutions(resolutions: dict[Size, float]) -> str | list[str] | dict[str, float] | None:
    """Returns the shortest setting with this meaning, so that runs with the same resolutions have the same identity."""
    names = {size_name(size): weight for size, weight in resolutions.items()}
    if len(names) < 2:
        return next(iter(names), None)
    return names if len({*names.values()}) > 1 else [*names]
