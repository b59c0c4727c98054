"""Layout `demo`: images that the program generates itself, for a first run without any data; see `demo_world`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from trainer.core.digests import Digests
from trainer.core.errors import UsageError
from trainer.dataset import Dataset
from trainer.dataset.listing import Listing
from trainer.dataset.sample import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainer.dataset.buckets import Size


class Task(Enum):
    """What a model learns: to edit a control image by instruction, or to generate what a caption describes."""

    edit = "edit"
    describe = "describe"


@dataclass(slots=True)
class Demo(Dataset):
    """Scenes and edits: `pairs` samples for training, and `held_out` other samples for validation.

    `task`: null is `edit` for a model with control images, else `describe`, which ignores `edits`.
    """

    task: Task | None = None
    edits: list[str] = field(default_factory=lambda: ["night"])
    pairs: int = 64
    held_out: int = 32

    generated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Dataset.__post_init__(self)
        if self.path is not None:
            raise UsageError(
                "dataset=demo generates its own images; "
                f"type dataset=pairs, dataset=imagefolder or another layout beside dataset.path={self.path}."
            )
        for name, value in (("pairs", self.pairs), ("held_out", self.held_out)):
            if value < 1:
                raise UsageError(
                    f"dataset.{name}={value} is not a number of images to generate: type dataset.{name}=1 or more."
                )

    def resolve(self, resolution: int, has_controls: bool) -> Self:
        task = self.task or (Task.edit if has_controls else Task.describe)
        return replace(Dataset.resolve(self, resolution, has_controls), task=task)

    def for_regularization(self) -> Self:
        raise UsageError(
            "dataset=demo has no layout of a folder: type dataset.regularization.caption='what the images show' beside "
            f"dataset.regularization.path={self.regularization.path}, whose images then all have this caption."
        )

    def describe(self) -> str:
        return "the demo world"

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Returns `pairs` training and `held_out` validation samples, with each kind of edit in turn.

        Raises errors.UsageError.
        """
        from trainer.dataset import demo_world

        unknown = [edit for edit in self.edits if edit not in demo_world.EDITS]
        if unknown or not self.edits:
            raise UsageError(
                f"dataset.edits={self.edits}: the edits of the demo world are {', '.join(demo_world.EDITS)}; "
                "type for example dataset.edits=[night]"
            )
        side = max(max(size) for size in self.resolutions())
        describe = self.task is Task.describe
        kinds = [demo_world.DESCRIBE] if describe else self.edits
        samples = []
        for split, count in (("train", self.pairs), ("validation", self.held_out)):
            for index in range(count):
                kind = kinds[index % len(kinds)]
                samples.append(
                    Sample(
                        id=f"{split}-{index:06d}-{kind}",
                        image=DemoSource(kind, split, index, side, target=True),
                        controls=() if describe else (DemoSource(kind, split, index, side, target=False),),
                        caption=demo_world.render_pair(kind, split, index, side)[1],
                        split=split,
                    )
                )
        return Listing(samples, found=len(samples))


@dataclass(frozen=True, slots=True)
class DemoSource:
    """One image of the demo world; see `trainer.dataset.source.Source`."""

    kind: str
    split: str
    index: int
    side: int
    target: bool

    @property
    def name(self) -> str:
        return f"demo {self.split} {self.index} {self.kind} {'target' if self.target else 'control'}"

    def open(self) -> Image:
        from trainer.dataset.demo_world import render_pair

        control, _, target = render_pair(self.kind, self.split, self.index, self.side)
        return target if self.target else control

    def digest(self) -> str:
        return hashlib.sha256(self.open().tobytes()).hexdigest()

    def memoize(self, key: str, compute: Callable[[], str]) -> str:
        return compute()

    def size(self) -> Size:
        return self.side, self.side
