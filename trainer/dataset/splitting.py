"""Which samples are for training, which are held out for validation, and which are a test set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.core import rng
from trainer.core.errors import DataError
from trainer.dataset.collector import SampleCollector
from trainer.dataset.sample import Sample

VALIDATION_NAMES = ("validation", "val", "test")
"""Names of the part of a dataset that is held out, in order of preference. Beside another, `test` is a test set."""


@dataclass(slots=True)
class Split:
    """The samples of a dataset by their use.

    `test` is a test set that the layout defines: neither training nor evaluation uses it, `stage=sample` can.
    `regularization` is for training, too; see `Dataset.regularization`.
    """

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample] = field(default_factory=list)
    regularization: list[Sample] = field(default_factory=list)

    @property
    def trained(self) -> list[Sample]:
        """All samples that training uses."""
        return [*self.train, *self.regularization]


def split_samples(samples: Sequence[Sample], fraction: float, *, dataset_name: str) -> Split:
    """Splits samples as the layout defines, else by a threshold on a hash of the id.

    Because of the hash, added samples do not move others. If the layout defines no split and `fraction` is above 0, at
    least one of several samples is held out and at least one is for training.

    Raises errors.DataError if there are no samples for training, or none for validation although `fraction` is above 0.
    """
    split = Split([], [])
    free = sorted((s for s in samples if s.split is None), key=lambda sample: rng.uniform("split", sample.id))
    count = sum(rng.uniform("split", sample.id) < fraction for sample in free)
    if fraction > 0 and len(free) == len(samples) > 1:
        count = min(max(count, 1), len(free) - 1)
    held_out = {sample.id for sample in free[:count]}
    for sample in samples:
        name = sample.split or ("validation" if sample.id in held_out else "train")
        getattr(split, name).append(sample)
    counts = (
        f"{dataset_name}: of {len(samples)} samples {len(split.train)} are for training "
        f"and {len(split.validation)} for validation"
    )
    if not split.train:
        remedy = (
            "type a smaller dataset.validation_fraction or a larger dataset.limit"
            if samples
            else "is this the right folder?"
        )
        raise DataError(f"{counts}. There is nothing to train on: {remedy}")
    if fraction > 0 and not split.validation:
        raise DataError(
            f"{counts}, at dataset.validation_fraction={fraction:g}. "
            "Add samples, or type dataset.validation_fraction=0 to train without validation."
        )
    return split


def limit_samples(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """Returns the first `limit` samples (None: all) of each split that the layout defines, sorted by id."""
    groups = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample.id):
        groups[sample.split].append(sample)
    return sorted((sample for group in groups.values() for sample in group[:limit]), key=lambda sample: sample.id)


def assign_splits(
    collector: SampleCollector, names: Iterable[str], train: str = "train", validation: str | None = None
) -> dict[str, str | None]:
    """Maps the parts of a dataset that are used to their splits.

    The split is None if no part is held out, so that the samples must still be split. `validation` names the part to
    hold out (None: the first of VALIDATION_NAMES). Returns {} if no part is named `train`.
    """
    names = list(names)
    if train not in names:
        return {}
    others = [name for name in VALIDATION_NAMES if name in names and name != train]
    held_out = validation or next(iter(others), None)
    if held_out is None:
        return {train: None}
    splits: dict[str, str | None] = {train: "train", held_out: "validation"}
    if "test" in others and held_out != "test":
        splits["test"] = "test"
    collector.notes += [
        f"{name} is ignored, because {held_out} is used for validation" for name in others if name not in splits
    ]
    return splits


def find_split_folders(collector: SampleCollector, has_layout: Callable[[Path], bool]) -> list[tuple[Path, str | None]]:
    """Returns the folders that have the layout, and the split of each.

    This is the root, or train/ beside validation/, val/ or test/.
    """
    if has_layout(collector.root):
        return [(collector.root, None)]
    names = [name for name in ("train", *VALIDATION_NAMES) if has_layout(collector.root / name)]
    splits = assign_splits(collector, names)
    # assign_splits has added a note on the others.
    collector.ignored += [collector.root / name for name in names if splits and name not in splits]
    return [(collector.root / name, split) for name, split in splits.items()]
