"""Files that lie in the folder of a dataset and are not used: found, and counted in notes for the user."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from trainer.dataset.image_formats import IMAGE_SUFFIXES, PLUGINS, UNREAD_SUFFIXES
from trainer.dataset.paths import walk

CAPTION_SUFFIXES = (".txt", ".caption")
"""Endings of caption files, in order of preference."""
MASKS = "masks"
"""Name of a folder of edit masks."""
MAX_NAMES = 3
"""Files that a note names."""

FileKey = tuple[int, int]
"""Device and inode of a file: names may differ in Unicode form, or in case, from what a table says."""


def file_key(path: Path) -> FileKey | None:
    """Returns what identifies a file; None if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def find_unused(root: Path, used: set[FileKey], ignored: Iterable[Path]) -> list[str]:
    """Returns the names of the files below a folder that are neither `used` nor hidden nor in an `ignored` folder."""
    found = []
    for folder in walk(root, ignored):
        paths = (folder.path / name for name in folder.files)
        found += [path.relative_to(root).as_posix() for path in paths if file_key(path) not in used]
    return found


def describe_unused(names: Iterable[str], caption_table: str | None) -> Iterator[str]:
    """Yields a line for each kind of unused file. `caption_table` is the file with the captions, if there is one."""
    groups: dict[str, list[str]] = {"image": [], "mask": [], "unread": [], "caption": [], "other": []}
    for name in names:
        groups[_kind(PurePosixPath(name))].append(name)
    unnamed = f", because {caption_table} does not name {{}}" if caption_table else ""
    reason = f", because {caption_table} has the captions" if caption_table else ""
    for kind, one, several in (
        ("image", f"image is not used{unnamed.format('it')}", f"images are not used{unnamed.format('them')}"),
        ("mask", "mask fits no image", "masks fit no image"),
        ("unread", "image is in a format that is not read", "images are in formats that are not read"),
        ("caption", f"caption file is not used{reason}", f"caption files are not used{reason}"),
        ("other", "other file is not used", "other files are not used"),
    ):
        if found := groups[kind]:
            remedy = ""
            if kind == "unread":
                plugins = {
                    PLUGINS[suffix] for name in found if (suffix := PurePosixPath(name).suffix.lower()) in PLUGINS
                }
                install = f"type pip install {' '.join(sorted(plugins))}, or " if plugins else ""
                remedy = f"; {install}save them as .jpg or .png"
            what = one if len(found) == 1 else several
            yield f"{len(found)} {what} ({_count_endings(found)}): {_show(found)}{remedy}"


def _kind(path: PurePosixPath) -> str:
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "mask" if MASKS in path.parts[:-1] else "image"
    if suffix in UNREAD_SUFFIXES:
        return "unread"
    return "caption" if suffix in CAPTION_SUFFIXES else "other"


def _count_endings(names: Iterable[str]) -> str:
    """Returns `2 .jpg, 1 .png`."""
    counts = Counter(PurePosixPath(name).suffix.lower() or "without ending" for name in names)
    shown = [f"{count} {suffix}" for suffix, count in counts.most_common(MAX_NAMES)]
    return ", ".join(shown) + (", ..." if len(counts) > MAX_NAMES else "")


def _show(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
