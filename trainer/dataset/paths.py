"""The files of a dataset's folder, and checks on the names that a dataset contains, which must not lead out of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

LINK_OUTSIDE = "is a link out of the dataset's folder; put the file itself there"
FOLDER_LINK_OUTSIDE = "is a link out of the dataset's folder; put the folder itself there"
SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}
"""Files and folders that operating systems and network storage put beside images, in lower case."""


def check_relative_path(name: object) -> PurePosixPath:
    """Returns a file name from a dataset's table as a path.

    Raises ValueError if it could lead out of the dataset's folder.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{name!r:.40} is not a file name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or re.match("[A-Za-z]:", name):
        raise ValueError(
            f"{name!r:.80} may lead out of the dataset's folder; names are relative to it, with / between folders"
        )
    if re.search("[\0-\x1f\ud800-\udfff]", name):
        raise ValueError(f"{name!r:.80} contains characters that file names cannot have")
    return path


def is_inside(folder: Path, path: Path) -> bool:
    """Returns whether `path` lies in `folder` after all links are followed. Opens no file."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is not the user's: its name begins with a dot, or a system created it."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


@dataclass(slots=True, frozen=True)
class WalkedFolder:
    """A folder that `walk` found. All names are sorted."""

    path: Path
    files: list[str]
    links: list[str]
    """Links to folders, which are not followed."""


def walk(
    root: Path, ignored: Iterable[Path] = (), on_error: Callable[[OSError], object] | None = None
) -> Iterator[WalkedFolder]:
    """Yields the folders from `root` down, in the order of their names.

    Leaves out hidden files and folders, and the folders `ignored` below the root. `on_error` is called with the error
    of a folder that cannot be read; None: such folders are left out.
    """
    excluded = {os.path.realpath(path) for path in ignored} - {os.path.realpath(root)}
    for name, folders, files in os.walk(root, onerror=on_error):
        path = Path(name)
        folders[:] = sorted(
            folder
            for folder in folders
            if not is_hidden(folder) and not (excluded and os.path.realpath(path / folder) in excluded)
        )
        links = [folder for folder in folders if os.path.islink(path / folder)]
        yield WalkedFolder(path, sorted(file for file in files if not is_hidden(file)), links)
