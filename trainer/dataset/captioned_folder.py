"""Images with a caption file beside each: NAME.jpg and NAME.txt (or NAME.caption), in a folder and its subfolders.

As in kohya's scripts, N_WORDS is a subfolder whose images an epoch visits N times, and WORDS is the caption of those
that have no caption file. An edit mask is masks/NAME.png, NAME_mask.png, or NAME-masklabel.png as in OneTrainer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer.core.errors import DataError
from trainer.dataset.collector import SampleCollector, read_caption
from trainer.dataset.image_formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES, describe_unread
from trainer.dataset.listing import plural
from trainer.dataset.paths import FOLDER_LINK_OUTSIDE, WalkedFolder, is_inside, walk
from trainer.dataset.sample import Sample, check_caption, sample_id
from trainer.dataset.source import FileSource
from trainer.dataset.splitting import VALIDATION_NAMES, assign_splits
from trainer.dataset.unused import CAPTION_SUFFIXES, MASKS

TABLE = "metadata.jsonl"
"""Name of the table that may contain the captions instead."""
MASK_ENDINGS = ("_mask", "-masklabel")
REPEATS = re.compile(r"([0-9]+)_(.*)", re.DOTALL)
MAX_REPEATS = 999
"""A larger number in front of a name is assumed to be a year or a date, as in 2024_summer."""

Groups = dict[str, list[Path]]
"""Sample id -> files; more than one is a fault."""


def find_captioned_folders(collector: SampleCollector) -> list[tuple[Path, str | None]]:
    """Returns the folders with images, and the split of each: the root, or train/ beside validation/, val/ or test/.

    Returns [] if there is no image. Raises errors.DataError if it is not clear which images are for training.
    """
    root = collector.root
    parts = ("train", *VALIDATION_NAMES)
    outside: list[Path] = []
    inside = []
    for path in _find_images(collector):
        first = path.relative_to(root).parts[0]
        if first in parts and path.parent != root:
            inside.append(first)
        else:
            outside.append(path)
    names = [name for name in parts if name in inside]
    if not names:
        return [(root, None)] if outside else []
    if outside:
        example = collector.relative_name(outside[0])
        raise DataError(
            f"{root}: there are images in {', '.join(f'{name}/' for name in names)} and {len(outside)} beside it "
            f"({example}). Move those for training into train/, or rename {names[0]}/ if it is not part of a split."
        )
    splits = assign_splits(collector, names)
    if not splits:
        raise DataError(f"{root}: there are images in {names[0]}/, but none for training. Put these into train/.")
    collector.ignored += [root / name for name in names if name not in splits]
    return [(root / name, split) for name, split in splits.items()]


def _walk(collector: SampleCollector, folder: Path) -> Iterator[WalkedFolder]:
    """Yields the folders from `folder` down that are not folders of masks."""

    def on_error(error: OSError) -> None:
        collector.add_fault(f"{collector.relative_name(Path(error.filename))}: cannot be read ({error.strerror})")

    for walked in walk(folder, collector.ignored, on_error):
        if MASKS not in walked.path.relative_to(folder).parts:
            yield walked


def _find_images(collector: SampleCollector) -> Iterator[Path]:
    for walked in walk(collector.root, collector.ignored):
        if MASKS not in walked.path.relative_to(collector.root).parts:
            paths = (walked.path / name for name in walked.files)
            yield from (path for path in paths if path.suffix.lower() in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES))


@dataclass(slots=True)
class _NumberedFolder:
    """A subfolder N_WORDS, which may have subfolders of its own."""

    path: Path
    repeats: int
    words: str
    count: int = 0
    """Number of images in it."""
    captioned_by_name: int = 0
    """Number of images whose caption is WORDS."""

    def describe(self, name: str) -> str:
        text = f"{name}: {plural(self.repeats, 'visit')} per epoch to each of its {plural(self.count, 'image')}"
        if self.captioned_by_name:
            text += f"; {self.captioned_by_name} without a caption file have the caption {self.words!r}"
        return text


@dataclass(slots=True)
class CaptionedFolder:
    """The files in `folder` and its subfolders, grouped by the sample that they belong to."""

    collector: SampleCollector
    folder: Path
    images: Groups = field(default_factory=dict)
    unread: Groups = field(default_factory=dict)
    """Images in formats that are not read. Beside an image of the same name, they are its sources (0.psd of 0.png)."""
    captions: dict[str, Groups] = field(default_factory=lambda: {suffix: {} for suffix in CAPTION_SUFFIXES})
    """Ending of caption files -> groups."""
    masks: Groups = field(default_factory=dict)
    """Masks that lie beside their images."""
    numbered: dict[Path, _NumberedFolder | None] = field(default_factory=dict)
    """Folder -> the nearest numbered folder that contains it, or is it."""
    tables: list[Path] = field(default_factory=list)
    """Files named TABLE in subfolders."""
    multiline: int = 0
    """Number of captions with several lines."""

    def collect(self, split: str | None) -> None:
        """Collects the samples. Raises errors.DataError if no image has a caption."""
        for walked in _walk(self.collector, self.folder):
            self._add_folder(walked)
        self._take_masks()
        self._require_captions()
        for id in sorted({*self.images, *self.unread}.union(*self.captions.values())):
            self._collect_sample(id, split)
        self._add_notes()

    def _add_folder(self, walked: WalkedFolder) -> None:
        collector, path = self.collector, walked.path
        for name in walked.links:
            if not is_inside(collector.root, path / name):
                collector.add_fault(f"{collector.relative_name(path / name)}: {FOLDER_LINK_OUTSIDE}")
        self.tables += [path / name for name in walked.files if name == TABLE]
        self.numbered[path] = number = self._find_number(path)
        if number is not None and number.repeats == 0:
            return
        for file in (path / name for name in walked.files):
            if file.suffix.lower() in UNREAD_SUFFIXES:
                self.unread.setdefault(self._id(file), []).append(file)
        places: list[tuple[Groups, tuple[str, ...]]] = [(self.images, IMAGE_SUFFIXES)]
        places += [(groups, (suffix,)) for suffix, groups in self.captions.items()]
        for groups, suffixes in places:
            for id, paths in collector.group_files(path, suffixes, self._id).items():
                groups.setdefault(id, []).extend(paths)

    def _id(self, path: Path) -> str:
        return sample_id(path.relative_to(self.collector.root))

    def _find_number(self, path: Path) -> _NumberedFolder | None:
        if path == self.folder:
            return None
        match = REPEATS.fullmatch(path.name)
        if match and len(match[1].lstrip("0")) <= len(str(MAX_REPEATS)):
            return _NumberedFolder(path, int(match[1]), match[2].strip())
        if match:
            self.collector.notes.append(
                f"{self.collector.relative_name(path)}: is read once per epoch; "
                f"a number of visits in front of a name is at most {MAX_REPEATS}"
            )
        return self.numbered.get(path.parent)

    def _take_masks(self) -> None:
        """Moves the images that are masks of others to the masks. An image with a caption file is never a mask."""
        for id in [*self.images]:
            base = next((id.removesuffix(ending) for ending in MASK_ENDINGS if id.endswith(ending)), None)
            if base in self.images and not any(id in groups for groups in self.captions.values()):
                self.masks.setdefault(base, []).extend(self.images.pop(id))

    def _require_captions(self) -> None:
        named = any(folder is not None and folder.words for folder in self.numbered.values())
        if self.images and not named and not any(self.captions.values()):
            tables = [*self.tables, self.collector.root.parent / TABLE]
            table = next((table for table in tables if table.is_file()), None)
            raise DataError(
                f"{self.folder}: none of its {plural(len(self.images), 'image')} has a caption. "
                + (f"Type dataset.path={table.parent} for those in {table}. " if table else "")
                + f"Write what NAME.jpg shows into NAME.txt beside it, or into {TABLE}; or move images of one thing "
                "into a folder 10_WORDS, where WORDS are their caption and 10 their visits per epoch. "
                "For other layouts type dataset=captions_json, dataset=csv, dataset=pairs or dataset=concepts."
            )

    def _collect_sample(self, id: str, split: str | None) -> None:
        collector = self.collector
        collector.found += 1
        if id not in self.images:
            unread = self.unread.get(id, [])
            captions = [path for groups in self.captions.values() for path in groups.get(id, [])]
            collector.mark_used(*unread)
            reason = describe_unread(unread[0]) if unread else "there is no image of this name"
            collector.add_fault(f"{collector.relative_name((unread or captions)[0])}: {reason}")
            return
        faults_before = len(collector.faults)
        first, *others = self.images[id]
        location = collector.relative_name(first)
        for path in others:
            collector.add_fault(f"{collector.relative_name(path)}: is the same sample as {location}")
        collector.register_id(id, location)
        image = collector.attempt("", collector.image_source, first)
        caption = self._read_caption(id, first)
        mask = collector.attempt(location, self._find_mask, id, first)
        folder = self.numbered[first.parent]
        if image is None or caption is None or len(collector.faults) > faults_before:
            return
        if folder is not None:
            folder.count += 1
        repeats = 1 if folder is None else folder.repeats
        collector.add(Sample(id, image, caption, split=split, mask=mask, repeats=repeats), location)

    def _read_caption(self, id: str, image: Path) -> str | None:
        """Returns the caption of a sample; adds a fault and returns None if there is none."""
        collector = self.collector
        for groups in self.captions.values():
            for path in groups.get(id, [])[:1]:
                caption = collector.attempt(collector.relative_name(path), read_caption, path)
                self.multiline += "\n" in (caption or "")
                return caption
        location, folder = collector.relative_name(image), self.numbered[image.parent]
        if folder is None or not folder.words:
            collector.add_fault(f"{location}: has no caption; there is no {image.stem}.txt beside it")
            return None
        folder.captioned_by_name += 1
        return collector.attempt(location, check_caption, folder.words)

    def _find_mask(self, id: str, image: Path) -> FileSource | None:
        places = [self.folder / MASKS / image.relative_to(self.folder), image.parent / MASKS / image.name]
        named = [path for place in dict.fromkeys(places) for path in self.collector.images_named(place.with_suffix(""))]
        return self.collector.take_mask([*self.masks.get(id, []), *named])

    def _add_notes(self) -> None:
        collector = self.collector
        for path, folder in self.numbered.items():
            if folder is not None and folder.path == path and (folder.count or not folder.repeats):
                name = collector.relative_name(path)
                collector.notes.append(folder.describe(name) if folder.repeats else f"{name}: is left out, as 0 says")
        preferred, other = (self.captions[suffix] for suffix in CAPTION_SUFFIXES)
        if both := len({*preferred} & {*other}):
            collector.notes.append(
                f"of {plural(both, 'sample')} with both, the {CAPTION_SUFFIXES[0]} is used "
                f"and the {CAPTION_SUFFIXES[1]} is not"
            )
        if self.multiline:
            collector.notes.append(f"captions of several lines, read as one text: {self.multiline}")
