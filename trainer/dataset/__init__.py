"""Data sets: a settings class for each layout, samples out of it, and their split into training and validation."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core import rng
from trainer.core.errors import DataError, UsageError
from trainer.dataset.sample import Sample, Source, Split, Task

if TYPE_CHECKING:
    from trainer.core.files import Digests
    from trainer.dataset.reading import Listing
    from trainer.dataset.view import Transform

Progress = Callable[[Sequence[Source]], Iterable[Source]]
"""Hands on what it is given, and may show how far it is."""


@dataclass(slots=True)
class Dataset:
    """What all layouts have in common.

    `resolution` is the side of a square (1024) or width x height ("832x576"); null: the model's own.
    `validation_fraction` is the share of samples held out where the layout does not say itself; 0 trains without validation.
    `on_fault`: stop refuses a set with any fault; skip goes on without the samples concerned, and keeps a record of them.
    `caption_dropout` and `control_dropout` are the shares of visits at which a sample's caption is empty, its control pictures grey.
    `control_resolution` is the size of control pictures; null: that of their target. `mask_floor` is the weight of the loss outside an edit mask.
    `buckets`: false for one size; true for sizes of the same number of pixels in several shapes, the longer side at most `bucket_ratio` times the
    shorter; or a list of sizes. Each picture takes that of the nearest shape. `max_upscale`: by what a picture may be enlarged for its size.
    `limit` keeps only the first samples in the order of their ids (of each split, where the layout has splits itself).
    """

    path: str | None = None
    resolution: str | None = None
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

    def __post_init__(self) -> None:
        self.size()
        _parsed("control_resolution", self.control_resolution)
        if not isinstance(self.buckets, bool | list) or self.buckets == []:
            raise UsageError(
                f"dataset.buckets={self.buckets} is unknown: type true, false, or a list of sizes such as [1024x1024,832x1216]."
            )
        for size in self.buckets if isinstance(self.buckets, list) else ():
            _parsed("buckets", size)
        if self.bucket_ratio < 1:
            raise UsageError(
                f"dataset.bucket_ratio={self.bucket_ratio:g} is no longer side over the shorter: type 1 or more."
            )
        if self.max_upscale is not None and self.max_upscale < 1:
            raise UsageError(
                f"dataset.max_upscale={self.max_upscale:g} is less than the picture itself: type 1 or more, or null for no bound."
            )
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(
                f"dataset.validation_fraction={self.validation_fraction} is no share of the samples: type 0 to 0.99."
            )
        for name in ("caption_dropout", "control_dropout", "mask_floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(
                    f"dataset.{name}={getattr(self, name)} is no number from 0 to 1; type one, such as dataset.{name}=0.1."
                )
        if self.on_fault not in ("stop", "skip"):
            raise UsageError(f"dataset.on_fault={self.on_fault} is unknown: type stop or skip.")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"dataset.limit={self.limit} leaves no samples: type 1 or more, or null for all.")

    def size(self) -> tuple[int, int] | None:
        """(width, height) in pixels that was asked for; None: the model's own. Raises errors.UsageError."""
        return _parsed("resolution", self.resolution)

    def folder(self) -> Path:
        """The data set's folder. Raises errors.UsageError where none was named, errors.DataError where it does not exist."""
        if not self.path:
            raise UsageError("This data set needs a folder: type dataset.path=FOLDER.")
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"dataset.path={self.path}: there is no such folder (looked for {folder.absolute()}). Type the right one."
            )
        return folder

    def read(self, digests: Digests) -> Listing:
        """All samples in any order, and all faults. Raises errors.DataError where the folder is no data set of this layout."""
        raise NotImplementedError


@dataclass(slots=True)
class Table(Dataset):
    """What the layouts with named columns have in common. `control_columns` name control pictures, `mask_column` an edit mask; without it
    masks/NAME.png is the mask of NAME.jpg."""

    caption_column: str = "text"
    image_column: str = "file_name"
    control_columns: list[str] = field(default_factory=list)
    mask_column: str | None = None


@dataclass(slots=True)
class ImageFolder(Table):
    """Pictures and a metadata.jsonl that names and captions them."""

    def read(self, digests: Digests) -> Listing:
        from trainer.dataset import imagefolder

        return imagefolder.read(self, digests)


@dataclass(slots=True)
class CaptionsJson(Table):
    """Pictures in images/ and a captions.json that captions them by name."""

    def read(self, digests: Digests) -> Listing:
        from trainer.dataset import captions_json

        return captions_json.read(self, digests)


@dataclass(slots=True)
class Csv(Table):
    """Pictures and a table of them; `path` may be the table. `delimiter`: null for a comma (.csv) or a tab (.tsv)."""

    delimiter: str | None = None

    def __post_init__(self) -> None:
        Dataset.__post_init__(self)
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise UsageError(
                f"dataset.delimiter={self.delimiter!r} is not one character; type for example dataset.delimiter=';'"
            )

    def read(self, digests: Digests) -> Listing:
        from trainer.dataset import csv

        return csv.read(self, digests)


@dataclass(slots=True)
class Hub(Table):
    """A data set of the Hugging Face hub, or a folder of the same form. `subset` is what the hub calls a configuration.

    `validation_split`: null takes validation, val or test where there is one.
    """

    image_column: str = "image"
    subset: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None

    def read(self, digests: Digests) -> Listing:
        from trainer.dataset import hub

        return hub.read(self, digests)


@dataclass(slots=True)
class Pairs(Dataset):
    """Control pictures and the pictures to be made of them, paired by name, with an instruction each."""

    def read(self, digests: Digests) -> Listing:
        from trainer.dataset import pairs

        return pairs.read(self, digests)


@dataclass(slots=True)
class Arrays(Dataset):
    """Pictures and descriptions as numpy arrays."""

    def read(self, digests: Digests) -> Listing:
        from trainer.dataset import arrays

        return arrays.read(self, digests)


@dataclass(slots=True)
class Concepts(Dataset):
    """A folder a concept. By its name: `triggers`, the word that every caption of it holds, put in front where it does not; `weights` of its
    samples' loss; `repeats`, how often an epoch visits each of them."""

    triggers: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Dataset.__post_init__(self)
        for name, word in self.triggers.items():
            if not word.strip():
                raise UsageError(f"dataset.triggers: that of {name} is empty; leave it out for captions as they are")
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise UsageError(
                    f"dataset.weights: {weight:g} for {name} is no weight of a loss; type a number above 0"
                )
        for name, count in self.repeats.items():
            if count < 1:
                raise UsageError(f"dataset.repeats: {count} for {name} visits nothing; type 1 or more")

    def read(self, digests: Digests) -> Listing:
        from trainer.dataset import concepts

        return concepts.read(self, digests)


@dataclass(slots=True)
class Personalized(Dataset):
    """Histories of what users liked, and the item to draw next. The caption is `template` with {history} (the captions of the items, joined by
    `separator`), {style}, {target} and {user} filled in."""

    caption_column: str = "caption"
    image_column: str = "image_path"
    template: str = "The user liked: {history}. Their style: {style}."
    separator: str = "; "

    def __post_init__(self) -> None:
        from trainer.dataset import template

        Dataset.__post_init__(self)
        template.check(self.template)

    def read(self, digests: Digests) -> Listing:
        from trainer.dataset import personalized

        return personalized.read(self, digests)


@dataclass(slots=True)
class Demo(Dataset):
    """A world of scenes and edits that the program draws itself: `pairs` samples to train on, `held_out` others to judge by.

    `task` null: edits for a model that reads control pictures, else described scenes, whose captions `edits` do not change.
    """

    task: Task | None = None
    edits: list[str] = field(default_factory=lambda: ["night"])
    pairs: int = 64
    held_out: int = 32

    def __post_init__(self) -> None:
        Dataset.__post_init__(self)
        if self.path is not None:
            raise UsageError(
                f"dataset=demo draws its own pictures; type dataset=pairs, dataset=imagefolder or another layout beside dataset.path={self.path}."
            )
        for name, value in (("pairs", self.pairs), ("held_out", self.held_out)):
            if value < 1:
                raise UsageError(
                    f"dataset.{name}={value} is no number of pictures to draw: type dataset.{name}=1 or more."
                )

    def read(self, digests: Digests) -> Listing:
        from trainer.dataset import demo
        from trainer.dataset.reading import Listing

        unknown = [edit for edit in self.edits if edit not in demo.EDITS]
        if unknown or not self.edits:
            raise UsageError(
                f"dataset.edits={self.edits}: the demo world draws {', '.join(demo.EDITS)}; type for example dataset.edits=[night]"
            )
        return Listing(demo.read(self, max(self.size())), found=self.pairs + self.held_out)


OPTIONS = {
    "arrays": Arrays,
    "captions_json": CaptionsJson,
    "concepts": Concepts,
    "csv": Csv,
    "demo": Demo,
    "hub": Hub,
    "imagefolder": ImageFolder,
    "pairs": Pairs,
    "personalized": Personalized,
}


def where(settings: Dataset) -> str:
    """How messages call the data set."""
    return f"dataset.path={settings.path}" if settings.path else "the demo world"


def read(settings: Dataset, digests: Digests) -> list[Sample]:
    """The samples of a data set in the order of their ids, `settings.limit` applied; of pictures only headers are read.

    Raises errors.UsageError without a path, and one errors.DataError that lists every fault.
    """
    listing = settings.read(digests)
    listing.refuse(where(settings))
    return limited(listing.samples, settings.limit)


def surveyed(settings: Dataset, digests: Digests, transform: Transform, progress: Progress) -> Listing:
    """The data set with every picture decoded once: those samples, ordered and limited, of which all can be used, and all faults.

    Raises errors.UsageError without a path, errors.DataError where the folder is no data set of this layout.
    """
    from trainer.dataset import buckets, survey

    listing = settings.read(digests)
    samples = limited(listing.samples, settings.limit)
    facts = {} if isinstance(settings, Demo) else survey.inspected(samples, progress)
    digests.flush()
    good = []
    for sample in samples:
        faults = [
            f"{source.name}: {facts[source].fault}"
            for source in survey.sources(sample)
            if source in facts and facts[source].fault
        ]
        size = sample.image.size()
        factor = buckets.enlargement(size, buckets.nearest(size, transform.sizes))
        if not faults and settings.max_upscale is not None and factor > settings.max_upscale:
            faults = [
                f"{sample.image.name}: {size[0]} x {size[1]} pixels would be enlarged {factor:.1f} times (dataset.max_upscale)"
            ]
        listing.faults += faults
        if not faults:
            good.append(sample)
    listing.samples, listing.facts = good, facts
    return listing


def limited(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The first `limit` samples of each split in the order of their ids."""
    groups = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample.id):
        groups[sample.split].append(sample)
    return sorted((sample for group in groups.values() for sample in group[:limit]), key=lambda sample: sample.id)


def transform(settings: Dataset, multiple: int) -> Transform:
    """The sizes of a data set's pictures for a model that takes sides divisible by `multiple`. Raises errors.UsageError."""
    from trainer.dataset import buckets
    from trainer.dataset.view import Transform

    def checked(key: str, text: object) -> tuple[int, int]:
        size = _parsed(key, text)
        if any(side % multiple for side in size):
            nearest = "x".join(str(max(1, round(side / multiple)) * multiple) for side in size)
            typed = f"[...,{nearest}]" if key == "buckets" else nearest
            raise UsageError(
                f"dataset.{key}={text}: this model takes sides divisible by {multiple}; type dataset.{key}={typed}"
            )
        return size

    control = (
        (checked("control_resolution", settings.control_resolution),) if settings.control_resolution is not None else ()
    )
    if isinstance(settings.buckets, list):
        return Transform(tuple(dict.fromkeys(checked("buckets", text) for text in settings.buckets)), control)
    size = checked("resolution", settings.resolution)
    return Transform(buckets.made(*size, multiple, settings.bucket_ratio) if settings.buckets else (size,), control)


def _parsed(key: str, text: object) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", str(text))
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not width or not height:
        raise UsageError(f"dataset.{key}={text} is no size: type 1024 for a square, or width x height like 832x576.")
    return width, height


def split(samples: Sequence[Sample], fraction: float, *, where: str) -> Split:
    """Divide samples: as the layout says, else by a threshold on a hash of the id, so that added samples move no others.

    Where few samples would all fall on one side the nearest to the threshold goes to the other. `where` names the data set in messages. Raises
    errors.DataError where there is nothing to train on, or nothing to hold out.
    """
    sides = Split([], [])
    free = sorted(
        (sample for sample in samples if sample.split is None), key=lambda sample: rng.uniform("split", sample.id)
    )
    held_out = sum(rng.uniform("split", sample.id) < fraction for sample in free)
    if fraction > 0 and len(free) == len(samples) > 1:
        held_out = min(max(held_out, 1), len(free) - 1)
    chosen = {sample.id for sample in free[:held_out]}
    for sample in samples:
        side = sample.split or ("validation" if sample.id in chosen else "train")
        getattr(sides, side).append(sample)
    counts = f"{where}: of {len(samples)} samples {len(sides.train)} are for training and {len(sides.validation)} for validation"
    if not sides.train:
        remedy = (
            "type a smaller dataset.validation_fraction or a larger dataset.limit"
            if samples
            else "is this the right folder?"
        )
        raise DataError(f"{counts}. There is nothing to train on: {remedy}")
    if fraction > 0 and not sides.validation:
        raise DataError(
            f"{counts}, at dataset.validation_fraction={fraction:g}. Add samples, or type dataset.validation_fraction=0 to train without validation."
        )
    return sides
