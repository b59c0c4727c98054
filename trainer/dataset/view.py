"""Samples as a model sees them: each picture at its size, perhaps mirrored, perhaps without caption or control."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.dataset.buckets import Size, nearest
from trainer.dataset.sample import Sample, Source

if TYPE_CHECKING:
    import numpy as np

GREY = 127
"""A control picture that was left away; next to 0 once pixels are scaled to [-1, 1]."""


@dataclass(slots=True, frozen=True)
class TransformedSample:
    """A sample as the model sees it. `control_sizes` are those of its control pictures; empty: the target's.

    Its pictures have names: `image` (the target), `mask`, and `control`, `control_2`, `control_3` ...
    """

    sample: Sample
    width: int
    height: int
    flip: bool = False
    drop_caption: bool = False
    drop_control: bool = False
    control_sizes: tuple[Size, ...] = ()

    @property
    def caption(self) -> str:
        return "" if self.drop_caption else self.sample.caption

    @property
    def controls(self) -> tuple[str, ...]:
        """The names of the control pictures."""
        return tuple("control" if i == 1 else f"control_{i}" for i in range(1, len(self.sample.controls) + 1))

    def source(self, name: str) -> Source | None:
        """The picture of this name, None where the sample has none. Raises KeyError."""
        return {
            "image": self.sample.image,
            "mask": self.sample.mask,
            **dict(zip(self.controls, self.sample.controls, strict=True)),
        }[name]

    def size(self, name: str) -> Size:
        """The size at which the model sees the picture of this name."""
        sizes = dict(zip(self.controls, self.control_sizes, strict=True)) if self.control_sizes else {}
        return sizes.get(name, (self.width, self.height))

    def picture(self, name: str) -> np.ndarray:
        """The picture of this name, (height, width, 3) uint8. Raises errors.DataError."""
        from trainer.dataset.picture import fit

        width, height = self.size(name)
        if self.drop_control and name in self.controls:
            import numpy as np

            return np.full((height, width, 3), GREY, np.uint8)
        return fit(self.source(name).open(), width, height, self.flip)

    def pixels(self) -> np.ndarray:
        """The target, (height, width, 3) uint8. Raises errors.DataError."""
        return self.picture("image")

    def control_pixels(self) -> list[np.ndarray]:
        """The controls, (height, width, 3) uint8 each. Raises errors.DataError."""
        return [self.picture(name) for name in self.controls]

    def geometry(self) -> tuple[int, int, int, int, int, int]:
        """(original height, original width, crop top, crop left, height, width), the crop in pixels of the scaled picture; see `picture.fit`."""
        width, height = self.sample.image.size()
        scale = max(self.width / width, self.height / height)
        top, left = round((height * scale - self.height) / 2), round((width * scale - self.width) / 2)
        return height, width, top, left, self.height, self.width

    def content(self, field: str) -> object:
        """What a field of the sample puts into the name of what is made from it: content and transform, never a name.

        Fields are the pictures by their names, all `controls` at once, `caption` and `geometry`. Raises ValueError.
        """
        if field == "caption":
            return self.caption
        if field == "geometry":
            return self.geometry()
        if field == "controls":
            return [self.content(name) for name in self.controls]
        try:
            source = self.source(field)
        except KeyError:
            raise ValueError(
                f"a sample has no field {field!r}: image, {', '.join(self.controls)}, controls, mask, caption, geometry"
            ) from None
        if self.drop_control and field in self.controls:
            return ["left away", *self.size(field)]
        return [source and source.digest(), *self.size(field), self.flip]

    def describe(self, field: str) -> list[str]:
        """For people: what a field is."""
        if field == "caption":
            return [f"caption {self.caption:.80}" if self.caption else "the empty caption"]
        if field == "geometry":
            return [f"the size of {self.sample.image.name}"]
        sources = [self.source(name) for name in (self.controls if field == "controls" else (field,))]
        return [source.name for source in sources if source]


@dataclass(slots=True, frozen=True)
class Transform:
    """The sizes to which pictures may be brought: each takes the one whose aspect ratio is nearest to its own.

    Of `control_sizes` (empty: controls take their target's size) controls choose by their own ratio.
    """

    sizes: tuple[Size, ...]
    control_sizes: tuple[Size, ...] = ()
    _known: dict[Source, Size] = field(default_factory=dict, repr=False, compare=False)

    def apply(
        self, sample: Sample, flip: bool = False, drop_caption: bool = False, drop_control: bool = False
    ) -> TransformedSample:
        own = (
            tuple(self._nearest(source, self.control_sizes) for source in sample.controls) if self.control_sizes else ()
        )
        return TransformedSample(
            sample, *self._nearest(sample.image, self.sizes), flip, drop_caption, drop_control, own
        )

    def _nearest(self, source: Source, sizes: tuple[Size, ...]) -> Size:
        if len(sizes) == 1:
            return sizes[0]
        # A header is read once, not at each visit.
        if source not in self._known:
            self._known[source] = source.size()
        return nearest(self._known[source], sizes)
