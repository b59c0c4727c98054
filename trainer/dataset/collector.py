"""`SampleCollector`: what all readers of layouts share.

It gathers samples, and every fault instead of only the first.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import ParamSpec, TypeVar

from trainer.core import documents
from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.core.files import storage_errors
from trainer.dataset.image_formats import IMAGE_SUFFIXES
from trainer.dataset.listing import Listing, plural
from trainer.dataset.paths import LINK_OUTSIDE, check_relative_path, is_hidden, is_inside
from trainer.dataset.sample import Sample, check_caption
from trainer.dataset.source import FileSource, Source
from trainer.dataset.unused import CAPTION_SUFFIXES, FileKey, describe_unused, file_key, find_unused

P = ParamSpec("P")
T = TypeVar("T")

MASK_RATIO_TOLERANCE = 0.02
"""Allowed relative difference between the aspect ratios of a mask and its image, for rounding in small images."""


class SampleCollector:
    """Collects the samples and faults below the folder `root`. A sample with a fault is not collected.

    `ignored` are folders that are not part of the dataset, although they may lie below the root. `owns_root` is whether
    everything else below the root belongs to the dataset, so that unused files are worth a note.
    """

    def __init__(self, root: Path, digests: Digests, ignored: Iterable[Path] = (), owns_root: bool = True):
        self.root, self.digests = root, digests
        self.ignored, self.owns_root = [*ignored], owns_root
        self.samples: list[Sample] = []
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.found = 0
        self.caption_table: str | None = None
        """Name of the file that has all captions, if there is one."""
        self.unused: list[str] = []
        """Unused parts of used files, such as members of an archive. Unused files are added at the end."""
        self._used: set[FileKey] = set()
        self._images: dict[Path, dict[str, list[Path]]] = {}
        """Folder -> name without suffix -> images; see `images_named`."""
        self._names: dict[Path, dict[str, list[str]]] = {}
        """Folder -> name in one Unicode form -> names; see `_find_form`."""
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
        self.mark_used(path)
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

    def mark_used(self, *paths: Path) -> None:
        """Remembers that samples or faults refer to these files, so that they do not count as unused."""
        self._used |= {key for path in paths if (key := file_key(path)) is not None}

    def relative_name(self, path: Path) -> str:
        """Returns the name of a file for messages: its path relative to the root."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def to_listing(self) -> Listing:
        """Returns everything that was collected.

        A sample with a different number of control images than most is a fault. Notes count the unused files.
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
        unused = [*self.unused, *(find_unused(self.root, self._used, self.ignored) if self.owns_root else ())]
        notes = [*self.notes, *describe_unused(unused, self.caption_table)]
        return Listing(samples, self.faults, notes, self.found, unused=unused)

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
            if is_hidden(name) or path.suffix.lower() not in suffixes:
                continue
            self.mark_used(path)
            if not is_inside(self.root, path):
                self.add_fault(f"{self.relative_name(path)}: {LINK_OUTSIDE}")
            elif not os.path.isfile(path):
                self.add_fault(f"{self.relative_name(path)}: is not a file")
            else:
                groups.setdefault(id_of(path), []).append(path)
        return groups

    def find_file(self, name: object, *folders: Path) -> Path | None:
        """Returns the file of a name in a table, relative to the first of the folders that has it; None if none has.

        Names may differ from those of files in their Unicode form. Raises ValueError if a name leads out of the root;
        does not touch a file there.
        """
        path = check_relative_path(name)
        for folder in folders:
            candidate = self._find_form(folder, path)
            if not is_inside(self.root, candidate):
                raise ValueError(f"{str(path)!r} {LINK_OUTSIDE}")
            if os.path.isfile(candidate):
                return candidate
        return None

    def _find_form(self, folder: Path, path: PurePath) -> Path:
        """Returns the path in a folder, with each part in the Unicode form that it has there, if there is only one."""
        for part in path.parts:
            if not part.isascii() and not os.path.lexists(folder / part) and is_inside(self.root, folder):
                if folder not in self._names:
                    names = self._names[folder] = {}
                    for name in os.listdir(folder) if os.path.isdir(folder) else ():
                        names.setdefault(_comparable(name), []).append(name)
                found = self._names[folder].get(_comparable(part), [])
                part = found[0] if len(found) == 1 else part
            folder /= part
        return folder

    def images_named(self, path: Path) -> list[Path]:
        """Returns the images whose path without suffix is `path`; suffixes may be in capitals."""
        folder = path.parent
        if folder.is_relative_to(self.root):
            folder = self._find_form(self.root, folder.relative_to(self.root))
        if folder not in self._images:
            groups = self._images[folder] = {}
            for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                image = folder / name
                if image.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name) and os.path.isfile(image):
                    groups.setdefault(_comparable(image.stem), []).append(image)
        return self._images[folder].get(_comparable(path.name), [])

    def find_mask(self, *paths: Path) -> FileSource | None:
        """Returns the mask of a sample, if there is one. `paths` are the places where it may be, without suffix.

        Raises ValueError, errors.DataError.
        """
        return self.take_mask([image for path in paths for image in self.images_named(path)])

    def take_mask(self, images: list[Path]) -> FileSource | None:
        """Returns the only mask that was found for a sample; None if there is none.

        Raises ValueError if there are several, and errors.DataError.
        """
        if len(images) > 1:
            self.mark_used(*images)
            raise ValueError(f"has several masks: {', '.join(map(self.relative_name, images))}")
        return self.image_source(images[0]) if images else None


def group_captions(collector: SampleCollector, folder: Path, id_of: Callable[[Path], str]) -> dict[str, list[Path]]:
    """Returns the caption files in a folder by sample id, in order of preference; see `group_files`."""
    groups: dict[str, list[Path]] = {}
    for suffix in CAPTION_SUFFIXES:
        for id, paths in collector.group_files(folder, (suffix,), id_of).items():
            groups.setdefault(id, []).extend(paths)
    return groups


def read_caption(path: Path) -> str:
    """Returns the caption in a text file. Raises ValueError, errors.StorageError."""
    with storage_errors("read", path):
        data = path.read_bytes()
    return decode_caption(data)


def decode_caption(data: bytes) -> str:
    """Returns the caption in UTF-8, or in UTF-16 with a byte order mark. Raises ValueError."""
    try:
        text = documents.decode(data)
    except ValueError as error:
        raise ValueError(f"{error}; save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("is UTF-16 without a byte order mark, or not text; save it as UTF-8")
    return check_caption(text)


def _comparable(name: str) -> str:
    # macOS decomposes file names.
    return unicodedata.normalize("NFC", name)


def _shape_mismatch(image: Source, mask: Source) -> str | None:
    """Returns why a mask does not fit its image; None if it does."""
    (width, height), (mask_width, mask_height) = image.size(), mask.size()
    if abs(width * mask_height - height * mask_width) <= MASK_RATIO_TOLERANCE * height * mask_width:
        return None
    return (
        f"its mask {mask.name} is {mask_width} x {mask_height} pixels, "
        f"which is not the shape of the image ({width} x {height})"
    )
