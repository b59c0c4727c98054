"""Files that are whole or absent: atomic writes, digests that are remembered, a lock that a dead owner cannot keep."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core import errors

if TYPE_CHECKING:
    pass

PARTIAL_PREFIX = ".partial-"
"""How the name of an unfinished file or folder begins; nobody may read what is behind it."""


def write(path: Path, data: bytes | str) -> None:
    """Put `data` (text as UTF-8) at `path`: after a crash the file holds the old bytes or the new, never a part. Makes missing folders.

    Raises errors.StorageError where the file cannot be written; then the old file is as it was.
    """
    with replace_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Lends a name to write one file to, which becomes `path` when the block ends well and is removed when it does not.

    An OSError, of the block or of the renaming, becomes errors.StorageError; then `path` is as it was. Makes missing folders.
    """
    temporary = temporary_path(path)
    with storage_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Like `replace_file`, for a folder: lends a new one, which takes the place of `path` (whatever that is) when the block ends well.

    Between its two renames a reader finds no `path`, and a process killed there leaves the old one under a partial name.
    """
    temporary, old = temporary_path(path), temporary_path(path)
    with storage_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                fsync(file)
            if os.path.lexists(path):
                os.rename(path, old)
            os.rename(temporary, path)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(path):
                os.rename(old, path)
            if os.path.lexists(temporary):
                remove(temporary)
            raise
        fsync_folder(path.parent)
        if os.path.lexists(old):
            remove(old)


def write_json(path: Path, value: Any) -> None:
    """Like `write`, for a value made of what JSON has. NaN and infinity are kept as Python spells them."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises errors.StorageError where it cannot be read, errors.DataError where it is not JSON."""
    with storage_errors("read", path):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise errors.DataError(
            f"{path} is not the JSON file it claims to be: {error}. Restore it, or move it away."
        ) from None


def temporary_path(path: Path) -> Path:
    """A name beside `path` that nobody else uses, for what is not finished."""
    return path.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}")


def remove_temporary(folder: Path) -> None:
    """Delete what dead processes left unfinished in a folder and below it, where only this process works. Raises errors.StorageError."""
    with storage_errors("clean", folder):
        for path in sorted(folder.rglob(f"{PARTIAL_PREFIX}*")):
            remove(path)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file's bytes (or a folder's names) are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk. Raises OSError."""
    try:
        fsync(path)
    except OSError as error:
        # Some network file systems cannot sync a folder and say EINVAL; their renames are as durable as they get.
        if error.errno != errno.EINVAL:
            raise


@contextlib.contextmanager
def storage_errors(verb: str, path: Path) -> Iterator[None]:
    """Turn an OSError inside into errors.StorageError that names `path` ("Could not <verb> <path>: reason")."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno, "")
        raise errors.StorageError(f"Could not {verb} {path}: {error.strerror or error}.{remedy}") from error


_CHOOSE = "choose another folder with out=<folder>."
_REMEDIES = {
    errno.ENOSPC: f" Free some space there, or {_CHOOSE}",
    errno.EDQUOT: f" Free some of your quota there, or {_CHOOSE}",
    errno.EFBIG: f" Raise the limit on the size of a file (ulimit -f), or {_CHOOSE}",
    errno.EROFS: f" Make it writable, or {_CHOOSE}",
    errno.EACCES: f" Ask for the right to it, or {_CHOOSE}",
    errno.EPERM: f" Ask for the right to it, or {_CHOOSE}",
    errno.ENOTDIR: f" A file stands where a folder should be: move it away, or {_CHOOSE}",
    errno.EEXIST: f" A file stands where a folder should be: move it away, or {_CHOOSE}",
}
