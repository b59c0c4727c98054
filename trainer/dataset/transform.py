"""Transforms: samples as a model sees them, resized, mirrored, without caption or control images."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError
from trainer.dataset import Dataset, parse_size, size_name
from trainer.dataset.buckets import Size, make_buckets, nearest_bucket, upscale_factor
from trainer.dataset.decoding_memory import reserved
from trainer.dataset.sample import Sample, control_names
from trainer.dataset.source import Source

if TYPE_CHECKING:
    import numpy as np

GRAY = 127
"""Pixel value of a control image that is dropped; close to 0 when pixels are scaled to [-1, 1]."""


@dataclass(slots=True, frozen=True)
class TransformedSample:
    """A sample as the model sees it: `width` x `height` pixels.

    Control images have this size too if `control_sizes` is empty. The images of a sample are named `image` (the
    target), `mask`, and `control`, `control_2`, `control_3`, ...
    """

    sample: Sample
    width: int
    height: int
    flip: bool = False
    drop_caption: bool = False
    drop_control: bool = False
    control_sizes: tuple[Size, ...] = ()
    shuffled_caption: str | None = None

    @property
    def caption(self) -> str:
        if self.drop_caption:
            return ""
        return self.sample.caption if self.shuffled_caption is None else self.shuffled_caption

    def text(self, name: str) -> str:
        """Returns one of the sample's `texts`, which are dropped with the caption. Raises KeyError."""
        text = dict(self.sample.texts)[name]
        return "" if self.drop_caption else text

    @property
    def control_names(self) -> tuple[str, ...]:
        return control_names(len(self.sample.controls))

    def source(self, name: str) -> Source | None:
        """Returns the source of an image by name; None if the sample has no mask.

        Raises KeyError for an unknown name.
        """
        return {
            "image": self.sample.image,
            "mask": self.sample.mask,
            **dict(zip(self.control_names, self.sample.controls, strict=True)),
        }[name]

    def size(self, name: str) -> Size:
        """Returns the size at which the model sees an image."""
        sizes = dict(zip(self.control_names, self.control_sizes, strict=True)) if self.control_sizes else {}
        return sizes.get(name, (self.width, self.height))

    def pixels(self, name: str = "image") -> np.ndarray:
        """Returns an image as (height, width, 3) uint8. Raises errors.DataError."""
        from trainer.dataset.image import fit

        width, height = self.size(name)
        if self.drop_control and name in self.control_names:
            import numpy as np

            return np.full((height, width, 3), GRAY, np.uint8)
        source = self.source(name)
        assert source is not None, f"{self.sample.id} has no {name}"
        with reserved(source):
            return fit(source.open(), width, height, self.flip)

    def control_pixels(self) -> list[np.ndarray]:
        """Returns the control images as (height, width, 3) uint8. Raises errors.DataError."""
        return [self.pixels(name) for name in self.control_names]

    def geometry(self) -> tuple[int, int, int, int, int, int]:
        """Returns (original height, original width, crop top, crop left, height, width).

        The crop is in pixels of the scaled image; see `image.fit`.
        """
        width, height = self.sample.image.size()
        scale = max(self.width / width, self.height / height)
        top, left = round((height * scale - self.height) / 2), round((width * scale - self.width) / 2)
        return height, width, top, left, self.height, self.width

    def content_key(self, field: str) -> object:
        """Returns what identifies a field in a cache key: its content and its transform, but not its file name.

        `field` is an image by its name, `controls` for all control images, `caption`, `geometry` or one of the texts.
        Raises ValueError for any other name.
        """
        if field == "caption":
            return self.caption
        if field in dict(self.sample.texts):
            return self.text(field)
        if field == "geometry":
            return self.geometry()
        if field == "controls":
            return [self.content_key(name) for name in self.control_names]
        try:
            source = self.source(field)
        except KeyError:
            fields = ", ".join(["image", *self.control_names, "controls", "mask", "caption", "geometry"])
            raise ValueError(f"a sample has no field {field!r}: {fields}") from None
        if self.drop_control and field in self.control_names:
            return ["left away", *self.size(field)]
        return [source and source.digest(), *self.size(field), self.flip]

    def describe(self, field: str) -> list[str]:
        """Returns names for a field that messages can show; see `content_key`."""
        if field == "caption":
            return [f"caption {self.caption:.80}" if self.caption else "the empty caption"]
        if field in dict(self.sample.texts):
            return [f"{field} {self.text(field):.80}"]
        if field == "geometry":
            return [f"the size of {self.sample.image.name}"]
        sources = [self.source(name) for name in (self.control_names if field == "controls" else (field,))]
        return [source.name for source in sources if source]


@dataclass(slots=True, frozen=True)
class Resolution:
    """One resolution of a run. Each image takes the size with the aspect ratio nearest to its own.

    `name` is its setting, and `weight` its relative share of the visits.
    """

    name: str
    sizes: tuple[Size, ...]
    weight: float = 1.0

    def size_of(self, original: Size) -> Size:
        """Returns the size that an image of this original size takes."""
        return self.sizes[0] if len(self.sizes) == 1 else nearest_bucket(original, self.sizes)


@dataclass(slots=True, frozen=True)
class Transform:
    """The `resolutions` that images are resized to, the smallest first.

    An image is never used at a resolution that would enlarge it more than `max_upscale` times. Control images take the
    size of their target if `control_sizes` is empty.
    """

    resolutions: tuple[Resolution, ...]
    control_sizes: tuple[Size, ...] = ()
    max_upscale: float | None = None
    _source_sizes: dict[Source, Size] = field(default_factory=dict, repr=False, compare=False)
    """Sizes of images, so that each header is read once instead of at each visit."""

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes that targets can have."""
        return tuple(dict.fromkeys(size for resolution in self.resolutions for size in resolution.sizes))

    def resolutions_of(self, source: Source) -> tuple[Resolution, ...]:
        """Returns the resolutions at which an image is used, the smallest first; possibly none."""
        if self.max_upscale is None:
            return self.resolutions
        size = self._original_size(source)
        return tuple(
            resolution
            for resolution in self.resolutions
            if upscale_factor(size, resolution.size_of(size)) <= self.max_upscale
        )

    def choose_resolution(self, source: Source, quantile: float) -> Resolution:
        """Returns the resolution of an image at this quantile, 0 to 1, of their shares of the visits."""
        resolutions = self.resolutions_of(source)
        bounds = list(accumulate(resolution.weight for resolution in resolutions))
        return resolutions[bisect(bounds, quantile * bounds[-1], hi=len(bounds) - 1)]

    def size_of(self, sample: Sample, resolution: Resolution | None = None) -> Size:
        """Returns the size of the target at a resolution; None: the largest at which the sample is used."""
        return self._choose_size(sample.image, resolution or self.resolutions_of(sample.image)[-1])

    def apply(
        self,
        sample: Sample,
        resolution: Resolution | None = None,
        *,
        flip: bool = False,
        drop_caption: bool = False,
        drop_control: bool = False,
        shuffled_caption: str | None = None,
    ) -> TransformedSample:
        """Returns the sample at a resolution; see `size_of`."""
        width, height = self.size_of(sample, resolution)
        control_sizes: tuple[Size, ...] = ()
        if self.control_sizes:
            controls = Resolution("control", self.control_sizes)
            control_sizes = tuple(self._choose_size(control, controls) for control in sample.controls)
        return TransformedSample(
            sample, width, height, flip, drop_caption, drop_control, control_sizes, shuffled_caption
        )

    def _choose_size(self, source: Source, resolution: Resolution) -> Size:
        if len(resolution.sizes) == 1:
            return resolution.sizes[0]
        return resolution.size_of(self._original_size(source))

    def _original_size(self, source: Source) -> Size:
        if source not in self._source_sizes:
            self._source_sizes[source] = source.size()
        return self._source_sizes[source]


def build_transform(settings: Dataset, multiple: int) -> Transform:
    """Returns the transform for a model whose image sides must be divisible by `multiple`. Raises errors.UsageError."""
    control_sizes: tuple[Size, ...] = ()
    if settings.control_resolution is not None:
        control_sizes = (_parse_divisible("control_resolution", settings.control_resolution, multiple),)
    resolutions = []
    for size, weight in settings.resolutions().items():
        if isinstance(settings.buckets, list):
            listed = [_parse_divisible("buckets", text, multiple) for text in settings.buckets]
            sizes = tuple(dict.fromkeys(listed))
        else:
            width, height = _parse_divisible("resolution", size_name(size), multiple, settings.resolution)
            sizes = ((width, height),)
            if settings.buckets:
                sizes = make_buckets(width, height, multiple, settings.bucket_ratio)
        resolutions.append(Resolution(size_name(size), sizes, weight))
    return Transform(tuple(resolutions), control_sizes, settings.max_upscale)


def _parse_divisible(key: str, text: object, multiple: int, setting: object = None) -> Size:
    size = parse_size(key, text)
    if any(side % multiple for side in size):
        width, height = (max(1, round(side / multiple)) * multiple for side in size)
        nearest = size_name((width, height))
        typed = f"[...,{nearest}]" if key == "buckets" or isinstance(setting, list | dict) else nearest
        raise UsageError(
            f"dataset.{key}={text}: this model takes sides divisible by {multiple}; type dataset.{key}={typed}"
        )
    return size
