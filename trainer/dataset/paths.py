"""Checks on file names that a dataset contains, which must not lead out of its folder."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

LINK_OUTSIDE = "is a link out of the dataset's folder; put the file itself there"


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
    """Whether `path` lies in `folder` after all links are followed. Opens no file."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
