"""What a reader finds in a data set: samples, and every fault beside them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from trainer.core.errors import DataError
from trainer.core.files import Digests, storage
from trainer.dataset.picture import SUFFIXES, FileSource
from trainer.dataset.sample import FAULTS_LISTED, Sample, Source, caption, inside
from trainer.dataset.survey import Facts

T = TypeVar("T")

VALIDATION = ("validation", "val", "test")
"""How the part of a data set to judge by is called; the first that is there is taken. A test part beside another is kept for the end."""
SKEW = 0.02
"""By how much the aspect ratio of a mask may differ from its picture's, as a share: what rounding makes of small pictures."""


@dataclass(slots=True)
class Listing:
    """`found` samples were looked at; `faults` are a line each, `notes` say what was left alone on purpose, `facts` are of pictures that were
    decoded."""

    samples: list[Sample]
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    found: int = 0
    facts: dict[Source, Facts] = field(default_factory=dict)

    def refuse(self, where: str, at_most: int | None = FAULTS_LISTED) -> None:
        """End with one errors.DataError that counts all faults and lists the first; nothing happens where there are none."""
        if self.faults:
            raise DataError(
                f"{self.counted(where)}. Mend or remove these, or type dataset.on_fault=skip to go on without:\n{self.listed(at_most)}"
            )

    def counted(self, where: str) -> str:
        return f"{where}: {_plural(len(self.faults), 'fault')} in {_plural(self.found, 'sample')}"

    def listed(self, at_most: int | None = None) -> str:
        """The faults (the first `at_most`), a line each."""
        lines = [f"  {fault}" for fault in self.faults[:at_most]]
        if len(lines) < len(self.faults):
            lines.append(f"  ... and {len(self.faults) - len(lines)} more (stage=check lists all)")
        return "\n".join(lines)


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


class Reading:
    """Collects what a reader finds below `root`. A sample with a fault is none."""

    def __init__(self, root: Path, digests: Digests):
        self.root, self.digests = root, digests
        self.samples: list[Sample] = []
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.found = 0
        self._places: dict[str, tuple[str, str]] = {}

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def tried(self, place: str, make: Callable[[], T]) -> T | None:
        """What `make` gives; None, and a fault of `place`, where it raises ValueError or errors.DataError."""
        try:
            return make()
        except (ValueError, DataError) as error:
            self.faults.append(f"{place}: {error}" if place else str(error))
            return None

    def picture(self, path: Path) -> FileSource:
        """A picture that lies below the root, judged by its header. Raises ValueError, errors.DataError."""
        if not inside(self.root, path):
            raise ValueError(f"{self.name(path)} is a link out of the data set's folder; put the file itself there")
        source = FileSource(path, self.digests)
        source.size()
        return source

    def acquire(self, id: str, place: str) -> bool:
        """Whether the id is new; a fault where it is not, or differs from another in case only."""
        if id.casefold() not in self._places:
            self._places[id.casefold()] = (id, place)
            return True
        first, where = self._places[id.casefold()]
        how = "is the same sample as" if first == id else "differs in case only from"
        self.fault(f"{place}: {how} {where}")
        return False

    def add(self, sample: Sample, place: str) -> None:
        """Keep a sample, if its mask lies over its target."""
        if sample.mask is not None and (fault := _misfit(sample.image, sample.mask)):
            self.fault(f"{place}: {fault}")
        else:
            self.samples.append(sample)

    def name(self, path: Path) -> str:
        """How messages call a file of the data set."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def listing(self) -> Listing:
        """All that was found. Samples with another number of control pictures than most are faults too."""
        counts = Counter(len(sample.controls) for sample in self.samples)
        usual = max(counts, key=lambda count: (counts[count], count), default=0)
        alike = []
        for sample in self.samples:
            if len(sample.controls) == usual:
                alike.append(sample)
            else:
                self.fault(
                    f"{sample.image.name}: has {_plural(len(sample.controls), 'control picture')}, where others have {usual}"
                )
        return Listing(alike, self.faults, self.notes, self.found)


def _misfit(image: Source, mask: Source) -> str | None:
    """Why a mask cannot lie over a picture."""
    (width, height), (across, down) = image.size(), mask.size()
    if abs(width * down - height * across) <= SKEW * height * across:
        return None
    return f"its mask {mask.name} is {across} x {down} pixels, of another shape than the picture ({width} x {height})"


def roles(
    reading: Reading, there: Iterable[str], train: str = "train", validation: str | None = None
) -> dict[str, str | None]:
    """Of the parts of a data set by name those that are used, and the split each is (None: to be divided). Empty without one to train on.

    `validation` names the part to judge by; None: as in VALIDATION.
    """
    there = list(there)
    if train not in there:
        return {}
    others = [name for name in VALIDATION if name in there and name != train]
    judged = validation or next(iter(others), None)
    if judged is None:
        return {train: None}
    used = {train: "train", judged: "validation"}
    if "test" in others and judged != "test":
        used["test"] = "test"
    for name in others:
        if name not in used:
            reading.notes.append(f"{name} is left alone, for {judged} is what the run is judged by")
    return used


def sides(reading: Reading, is_layout: Callable[[Path], bool]) -> list[tuple[Path, str | None]]:
    """The folders of a data set and the split each is: the root itself, or train/ beside validation/, val/ or test/. Empty where none is one."""
    if is_layout(reading.root):
        return [(reading.root, None)]
    there = [name for name in ("train", *VALIDATION) if is_layout(reading.root / name)]
    return [(reading.root / name, split) for name, split in roles(reading, there).items()]


def by_name(
    reading: Reading, folder: Path, suffixes: tuple[str, ...], name_of: Callable[[Path], str]
) -> dict[str, list[Path]]:
    """The files with these endings that lie directly in a folder, by the sample they belong to. Links out and what is no file are faults."""
    found: dict[str, list[Path]] = {}
    with storage("read", folder):
        names = sorted(os.listdir(folder))
    for name in names:
        path = folder / name
        if name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        if not inside(reading.root, path):
            reading.fault(f"{reading.name(path)}: is a link out of the data set's folder; put the file itself there")
        elif not os.path.isfile(path):
            reading.fault(f"{reading.name(path)}: is not a file")
        else:
            found.setdefault(name_of(path), []).append(path)
    return found


def beside(reading: Reading, folder: Path, stem: str) -> FileSource | None:
    """The picture of this name in a folder of masks, None where there is none. Raises ValueError, errors.DataError."""
    found = [path for suffix in SUFFIXES if os.path.isfile(path := folder / f"{stem}{suffix}")]
    if found[1:]:
        raise ValueError(f"has several masks: {', '.join(reading.name(path) for path in found)}")
    return reading.picture(found[0]) if found else None


def text_of(path: Path) -> str:
    """The caption in a text file. Raises ValueError, errors.StorageError."""
    with storage("read", path):
        data = path.read_bytes()
    return caption(data.decode("utf-8-sig"))
