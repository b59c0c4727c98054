"""`SampleCollector`: what all readers of layouts share.

It gathers samples, and every fault instead of only the first.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.core.files import storage_errors
from trainer.dataset.listing import Listing, plural
from trainer.dataset.paths import LINK_OUTSIDE, is_inside
from trainer.dataset.sample import Sample, check_caption
from trainer.dataset.source import IMAGE_SUFFIXES, FileSource, Source

P = ParamSpec("P")
T = TypeVar("T")

MASK_RATIO_TOLERANCE = 0.02
"""Allowed relative difference between the aspect ratios of a mask and its image, for rounding in small images."""


class SampleCollector:
    """Collects the samples and faults below the folder `root`. A sample with a fault is not collected."""

    def __init__(self, root: Path, digests: Digests):
        self.root, self.digests = root, digests
        self.samples: list[Sample] = []
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.found = 0
        self._ids: dict[str, tuple[str, str]] = {}
        """Case-folded id -> id, location."""

    def add_fault(self, text: str) -> None:
        self.faults.append(text)

    def attempt(self, location: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Calls a function.

        If it raises ValueError or errors.DataError, records a fault at `location` and returns None.
        """
        try:
            return function(*args, **kwargs)
        except (ValueError, DataError) as error:
            self.add_fault(f"{location}: {error}" if location else str(error))
            return None

    def image_source(self, path: Path) -> FileSource:
        """Returns the source of an image below the root after a check of its header.

        Raises ValueError, errors.DataError.
        """
        if not is_inside(self.root, path):
            raise ValueError(f"{self.relative_name(path)} {LINK_OUTSIDE}")
        source = FileSource(path, self.digests)
        source.size()
        return source

    def register_id(self, id: str, location: str) -> bool:
        """Returns whether the id is new. Records a fault if it is not, or if it differs from another in case only."""
        if id.casefold() not in self._ids:
            self._ids[id.casefold()] = (id, location)
            return True
        first_id, first_location = self._ids[id.casefold()]
        relation = "is the same sample as" if first_id == id else "differs in case only from"
        self.add_fault(f"{location}: {relation} {first_location}")
        return False

    def add(self, sample: Sample, location: str) -> None:
        """Adds a sample, or a fault if its mask does not have the shape of its image."""
        if sample.mask is not None and (reason := _shape_mismatch(sample.image, sample.mask)):
            self.add_fault(f"{location}: {reason}")
        else:
            self.samples.append(sample)

    def relative_name(self, path: Path) -> str:
        """Name of a file for messages: its path relative to the root."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def to_listing(self) -> Listing:
        """Returns everything that was collected.

        A sample that has not as many control images as most have is a fault.
        """
        counts = Counter(len(sample.controls) for sample in self.samples)
        usual = max(counts, key=lambda count: (counts[count], count), default=0)
        samples = []
        for sample in self.samples:
            if len(sample.controls) == usual:
                samples.append(sample)
            else:
                own = plural(len(sample.controls), "control image")
                self.add_fault(f"{sample.image.name}: has {own}, but most samples have {usual}")
        return Listing(samples, self.faults, self.notes, self.found)

    def group_files(
        self, folder: Path, suffixes: tuple[str, ...], id_of: Callable[[Path], str]
    ) -> dict[str, list[Path]]:
        """Returns the files with these suffixes directly in a folder, grouped by sample id.

        Links out of the root, and names of anything but files, are faults.
        """
        groups: dict[str, list[Path]] = {}
        with storage_errors("read", folder):
            names = sorted(os.listdir(folder))
        for name in names:
            path = folder / name
            if name.startswith(".") or path.suffix.lower() not in suffixes:
                continue
            if not is_inside(self.root, path):
                self.add_fault(f"{self.relative_name(path)}: {LINK_OUTSIDE}")
            elif not os.path.isfile(path):
                self.add_fault(f"{self.relative_name(path)}: is not a file")
            else:
                groups.setdefault(id_of(path), []).append(path)
        return groups

    def find_mask(self, folder: Path, stem: str) -> FileSource | None:
        """Returns the image named `stem` in a folder of masks, if there is one. Raises ValueError, errors.DataError."""
        paths = [path for suffix in IMAGE_SUFFIXES if os.path.isfile(path := folder / f"{stem}{suffix}")]
        if len(paths) > 1:
            raise ValueError(f"has several masks: {', '.join(map(self.relative_name, paths))}")
        return self.image_source(paths[0]) if paths else None


def read_caption(path: Path) -> str:
    """Returns the caption in a text file. Raises ValueError, errors.StorageError."""
    with storage_errors("read", path):
        data = path.read_bytes()
    return check_caption(data.decode("utf-8-sig"))


def _shape_mismatch(image: Source, mask: Source) -> str | None:
    """Why a mask does not fit its image; None if it does."""
    (width, height), (mask_width, mask_height) = image.size(), mask.size()
    if abs(width * mask_height - height * mask_width) <= MASK_RATIO_TOLERANCE * height * mask_width:
        return None
    return (
        f"its mask {mask.name} is {mask_width} x {mask_height} pixels, "
        f"which is not the shape of the image ({width} x {height})"
    )
