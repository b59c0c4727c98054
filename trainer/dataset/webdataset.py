"""Layout `webdataset`: tar archives ("shards") whose members KEY.jpg, KEY.txt, ... are a sample, read in place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from trainer.core import documents
from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.dataset import Dataset
from trainer.dataset.collector import SampleCollector, decode_caption
from trainer.dataset.image_formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES, describe_unread
from trainer.dataset.listing import Listing
from trainer.dataset.paths import check_relative_path, is_hidden
from trainer.dataset.sample import Sample, check_caption, control_names, sample_id
from trainer.dataset.splitting import VALIDATION_NAMES, assign_splits, find_split_folders
from trainer.dataset.table import read_cell, to_row
from trainer.dataset.tar_files import MAX_TEXT, Member, TarSource, read_member, read_members
from trainer.dataset.unused import CAPTION_SUFFIXES

SUFFIX = ".tar"
SPLIT_NAME = re.compile(rf"(train|{'|'.join(VALIDATION_NAMES)})(?![a-z])", re.IGNORECASE)
"""`train-0000`, `validation_3`, `val` and `test.1`, but not `training-0` or `testing`."""
JSON_KEY = "caption"
"""Key of the caption in KEY.json, unless a setting names another."""
JSON = "json"
ROLE = re.compile(r"mask|control(_[0-9]{1,2})?")


@dataclass(slots=True)
class WebDataset(Dataset):
    """Tar archives of images and captions.

    `caption_column` is the key of the caption in KEY.json; null: KEY.txt, else KEY.caption, else "caption" of KEY.json.
    """

    caption_column: str | None = None

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Reads one sample per key; see `Dataset.read`.

        `path` is an archive, or a folder with archives, with train-*.tar and validation-*.tar, or with such folders.
        """
        path = Path(self.path or "").expanduser()
        if self.path and path.is_file():
            collector = SampleCollector(path.parent, digests, owns_root=False)
            shards: list[tuple[Path, str | None]] = [(path, None)]
        else:
            collector = SampleCollector(self.require_folder(), digests, ignored)
            shards = _find_shards(self, collector)
        for shard, split in shards:
            _Shard(collector, self, shard).collect(split)
        if not collector.found and not collector.faults:
            raise DataError(
                f"{self.describe()}: there is no member NAME.jpg in its archives. Is this the right folder?"
            )
        return collector.to_listing()


def _find_shards(settings: WebDataset, collector: SampleCollector) -> list[tuple[Path, str | None]]:
    """Returns the archives that are used, and the split of each. Raises errors.DataError."""

    def shards_in(folder: Path) -> list[Path]:
        groups = collector.group_files(folder, (SUFFIX,), str) if folder.is_dir() else {}
        return [path for paths in groups.values() for path in paths]

    folders = find_split_folders(collector, lambda folder: any(_names_of_archives(folder)))
    if not folders:
        raise DataError(
            f"dataset.path={settings.path}: there is no {SUFFIX} in it, whose members NAME.jpg and NAME.txt "
            "are an image and its caption. Type dataset=imagefolder if they are not in archives."
        )
    if folders[0][0] != collector.root:
        return [(shard, split) for folder, split in folders for shard in shards_in(folder)]
    parts: dict[str, list[Path]] = {}
    for shard in shards_in(collector.root):
        match = SPLIT_NAME.match(shard.stem)
        parts.setdefault(match[1].lower() if match else "", []).append(shard)
    if parts.keys() <= {""}:
        return [(shard, None) for shard in parts.get("", [])]
    splits = assign_splits(collector, parts)
    if not splits or "" in parts:
        names = ", ".join(shards[0].name for shards in parts.values())
        raise DataError(
            f"dataset.path={settings.path}: it is not clear which archives are for training ({names}). Name all of "
            f"these train-*{SUFFIX}, and those to hold out validation-*{SUFFIX}; or name none so."
        )
    return [(shard, split) for name, split in splits.items() for shard in parts[name]]


def _names_of_archives(folder: Path) -> list[str]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path.name for path in paths if path.suffix.lower() == SUFFIX and not is_hidden(path.name)]


@dataclass(slots=True)
class _Shard:
    """One archive, whose members are grouped by their keys."""

    collector: SampleCollector
    settings: WebDataset
    path: Path
    samples: dict[str, dict[str, Member]] = field(default_factory=dict)
    """Key -> ending without the first dot, in lower case -> member."""

    def collect(self, split: str | None) -> None:
        for member in read_members(self.path):
            if isinstance(member, ValueError):
                self.collector.add_fault(f"{self._name}: {member}")
            else:
                self._add_member(member)
        for key, members in self.samples.items():
            if any(map(_is_part, members)):
                self.collector.found += 1
                self._collect_sample(key, members, split)
            else:
                self._note_unused(members.values())

    @property
    def _name(self) -> str:
        return self.collector.relative_name(self.path)

    def _add_member(self, member: Member) -> None:
        path = self.collector.attempt(f"{self._name}: its member", check_relative_path, member.name)
        if path is None or any(is_hidden(part) for part in path.parts):
            return
        key, ending = split_name(path)
        # macOS decomposes file names.
        key = unicodedata.normalize("NFC", key)
        members = self.samples.setdefault(key, {})
        if ending in members:
            self.collector.add_fault(f"{self._location(member)}: is in the archive twice")
        else:
            members[ending] = member

    def _location(self, member: Member) -> str:
        return f"{self._name}/{member.name}"

    def _collect_sample(self, key: str, members: dict[str, Member], split: str | None) -> None:
        collector = self.collector
        faults_before = len(collector.faults)
        location = f"{self._name}/{key}"
        images = [ending for ending in sorted(members) if _is_image(ending)]
        if not images:
            collector.add_fault(f"{location}: {_why_no_image(members)}")
            return
        for ending in images[1:]:
            collector.add_fault(f"{location}.{ending}: is the same sample as {location}.{images[0]}")
        id = f"{sample_id(PurePosixPath(self._name))}/{key}"
        collector.register_id(id, f"{location}.{images[0]}")
        caption_ending = next((ending for ending in self._caption_endings() if ending in members), None)
        caption = collector.attempt(location, self._read_caption, members, caption_ending)
        roles = {role: ending for ending in members if (role := _role(ending))}
        sources = {role: self._open(members[ending]) for role, ending in roles.items()}
        image, mask = self._open(members[images[0]]), sources.pop("mask", None)
        if sources.keys() != {*control_names(len(sources))}:
            named = ", ".join(sorted(sources))
            collector.add_fault(f"{location}: has {named}, but control images are named control, control_2, ...")
        used = {*images, *roles.values(), caption_ending}
        self._note_unused(member for ending, member in members.items() if ending not in used)
        if image is None or caption is None or len(collector.faults) > faults_before:
            return
        controls = tuple(source for name in control_names(len(sources)) if (source := sources[name]))
        collector.add(Sample(id, image, caption, controls, split, mask), location)

    def _open(self, member: Member) -> TarSource | None:
        """Returns an image after a check of its header; adds a fault and returns None if it cannot be read."""
        source = TarSource(self.path, member, self.collector.digests)
        return source if self.collector.attempt("", source.size) else None

    def _caption_endings(self) -> tuple[str, ...]:
        """The endings of members that may have the caption, in order of preference."""
        if self.settings.caption_column is not None:
            return (JSON,)
        return (*(suffix.removeprefix(".") for suffix in CAPTION_SUFFIXES), JSON)

    def _read_caption(self, members: dict[str, Member], ending: str | None) -> str:
        """Returns the caption in the member with this ending. Raises ValueError, errors.StorageError."""
        if ending is None:
            expected = " or ".join(f".{name}" for name in self._caption_endings())
            raise ValueError(f"has no caption; there is no {expected} of this name")
        try:
            data = read_member(self.path, members[ending], MAX_TEXT)
            if ending != JSON:
                return decode_caption(data)
            row = documents.parse_json(data, to_row)
            if not isinstance(row, dict):
                raise ValueError("is not a JSON object")
            return check_caption(read_cell(row, self.settings.caption_column or JSON_KEY, "caption_column"))
        except ValueError as error:
            raise ValueError(f"its .{ending}: {error}") from None

    def _note_unused(self, members: Iterable[Member]) -> None:
        self.collector.unused += [self._location(member) for member in members]


def split_name(path: PurePosixPath) -> tuple[str, str]:
    """Splits a member's name at the first dot of its last part, as the library `webdataset` does.

    Returns the key of the sample, and the ending in lower case: sub/0001.control.png -> sub/0001, control.png.
    """
    stem, _, ending = path.name.partition(".")
    return (path.parent / stem).as_posix(), ending.lower()


def _is_image(ending: str) -> bool:
    return f".{ending}" in IMAGE_SUFFIXES


def _role(ending: str) -> str | None:
    """mask.png -> mask, control_2.jpg -> control_2; None for another ending."""
    role, _, suffix = ending.rpartition(".")
    return role if _is_image(suffix) and ROLE.fullmatch(role) else None


def _is_part(ending: str) -> bool:
    """Whether a member with this ending belongs to a sample. A .json alone may be anything."""
    suffix = f".{ending.rpartition('.')[2]}"
    return suffix in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES) or f".{ending}" in CAPTION_SUFFIXES


def _why_no_image(members: dict[str, Member]) -> str:
    if unread := next((ending for ending in sorted(members) if f".{ending}" in UNREAD_SUFFIXES), None):
        return f"its image {describe_unread(Path(members[unread].name))}"
    longer = next((ending for ending in sorted(members) if _is_part(ending) and "." in ending), None)
    reason = f"; .{longer} is not it, because names are split at their first dot" if longer else ""
    return f"has no image ({', '.join(f'.{ending}' for ending in sorted(members))}){reason}"
