"""Atomic writes: after a crash, a file or folder has either its old or its new content, never only part of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.core import errors

PARTIAL_PREFIX = ".partial-"
"""Names of unfinished files and folders begin with this. Readers must ignore them."""


def write(path: Path, data: bytes | str, setting: str = "out") -> None:
    """Writes a file atomically, text as UTF-8, and creates missing folders.

    Raises errors.StorageError and leaves the old file unchanged if it cannot be written; for `setting` see
    `storage_errors`.
    """
    with replace_file(path, setting) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replace_file(path: Path, setting: str = "out") -> Iterator[Path]:
    """Yields a temporary path to write a file to. It replaces `path` when the block ends, and is removed if it raises.

    An OSError, inside the block or from the replacement, becomes errors.StorageError, see `storage_errors`. Creates
    missing folders.
    """
    temporary = temporary_path(path)
    with storage_errors("write", path, setting):
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
    """Like `replace_file` for a folder: yields a new folder that replaces whatever is at `path` when the block ends.

    This takes two renames. Between them readers find nothing at `path`, and a process that is killed there leaves the
    old folder under a temporary name.
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
    """Writes a JSON file atomically. NaN and infinity are written as Python's `json` does."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def open_plain(path: Path, flags: int) -> int:
    """Opens or creates a file that is changed in place, and returns its descriptor. Raises OSError.

    Refuses a link, which would lead the write to another place, and anything that is not a file.
    """
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    return descriptor


def make_plain_folder(path: Path) -> None:
    """Creates a folder and its parents. Raises OSError, also if `path` is a link; its parents may be links."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def check_plain(folder: Path) -> None:
    """Raises errors.StorageError if there is a link, a pipe or a device anywhere in a folder of the program.

    The program would write to, or delete from, the place to which a link leads. `folder` may be a link itself. Hidden
    links are ignored: they belong to other programs, such as editors.
    """
    with storage_errors("read", folder):
        paths = [Path(parent, name) for parent, *names in os.walk(folder) for name in (*names[0], *names[1])]
    for path in paths:
        if path.name.startswith("."):
            continue
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            what = f"a link to {os.readlink(path)}" if stat.S_ISLNK(mode) else "a pipe or device"
            raise errors.StorageError(
                f"{path} is {what}. The program writes to plain files and folders only, since it would change other "
                f"places through a link: move it away, or put what it leads to in its place. {folder} itself may be a "
                "link."
            )


def temporary_path(path: Path) -> Path:
    """Returns a unique path in the same folder, for a file or folder that is not finished yet."""
    return path.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}")


def remove_temporary(folder: Path) -> None:
    """Deletes all unfinished files and folders below a folder, in which no other process may be writing.

    Raises errors.StorageError.
    """
    with storage_errors("clean", folder):
        for path in sorted(folder.rglob(f"{PARTIAL_PREFIX}*")):
            remove(path)


def remove(path: Path) -> None:
    """Deletes a file, a link, or a folder with its content. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Waits until the content of a file, or the list of names in a folder, is on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Waits until the list of names in a folder is on disk, where the file system can. Raises OSError."""
    try:
        fsync(path)
    except OSError as error:
        # Some network file systems cannot sync folders and return EINVAL. Nothing more can be done there.
        if error.errno != errno.EINVAL:
            raise


@contextlib.contextmanager
def storage_errors(verb: str, path: Path, setting: str = "out") -> Iterator[None]:
    """Turns an OSError inside the block into errors.StorageError: "Could not <verb> <path>: <reason>" and a remedy.

    `setting` chooses the folder of the file. The remedy to change it is left out for the verb "read", because another
    folder would not have the file.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        choice = "" if verb == "read" else f", or choose another folder with {setting}=<folder>"
        advice = f" {remedy}{choice}." if remedy else ""
        raise errors.StorageError(f"Could not {verb} {path}: {error.strerror or error}.{advice}") from error


@contextlib.contextmanager
def library_errors(path: Path, remedy: str = "Restore it, or type a different one") -> Iterator[None]:
    """Turns whatever a library raises while it reads `path` inside the block into an exception that names the file.

    A file that somebody else wrote makes libraries raise all kinds of exceptions. They become errors.DataError, and
    errors of the disk become errors.StorageError. Passes on errors of this program, and failed allocations.
    """
    with storage_errors("read", path):
        try:
            yield
        except errors.TrainerError:
            raise
        except Exception as error:
            # Some libraries raise an OSError of their own, without a number, about the content of a file.
            if errors.is_out_of_memory(error) or (isinstance(error, OSError) and error.errno is not None):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise errors.DataError(f"{path} cannot be read ({reason}). {remedy}.") from error


@contextlib.contextmanager
def full_disk_errors() -> Iterator[None]:
    """Turns an OSError of a full, read-only or faulty disk inside the block into errors.StorageError with a remedy.

    Use this around a whole program, and `storage_errors` where the file is known: it names the file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise
        raise errors.StorageError(
            f"{error}: free some space, or choose another folder with out=FOLDER (for runs) or cache.path=FOLDER (for "
            "the cache), and type the same command again"
        ) from error


_REMEDIES = {
    errno.ENOSPC: "Free some disk space",
    errno.EDQUOT: "Free some of your disk quota",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "Make the file system writable",
    errno.EACCES: "Ask for permission",
    errno.EPERM: "Ask for permission",
    errno.ENOTDIR: "A file is in the place of a folder: move it away",
    errno.ELOOP: "A link is in the place of a file or folder: move it away",
    errno.EEXIST: "A file is in the place of a folder: move it away",
}
