"""Files that are whole or absent: atomic writes, digests that are remembered, a lock that a dead owner cannot keep."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sqlite3
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trainer.core import errors

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial-"
"""How the name of an unfinished file or folder begins; nobody may read what is behind it."""


def write(path: Path, data: bytes | str) -> None:
    """Put `data` (text as UTF-8) at `path`: after a crash the file holds the old bytes or the new, never a part. Makes missing folders.

    Raises errors.StorageError where the file cannot be written; then the old file is as it was.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lends a name to write one file to, which becomes `path` when the block ends well and is removed when it does not.

    An OSError, of the block or of the renaming, becomes errors.StorageError; then `path` is as it was. Makes missing folders.
    """
    temporary = partial(path)
    with storage("write", path):
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
def replacing_folder(path: Path) -> Iterator[Path]:
    """Like `replacing`, for a folder: lends a new one, which takes the place of `path` (whatever that is) when the block ends well.

    Between its two renames a reader finds no `path`, and a process killed there leaves the old one under a partial name.
    """
    temporary, old = partial(path), partial(path)
    with storage("write", path):
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


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """safetensors' `save_file` for any dense tensors, on any device, contiguous or not, sharing memory or not. Raises OSError.

    The file is neither atomic nor on the disk yet: `with replacing(path) as temporary: save_tensors(temporary, tensors)`.
    """
    import safetensors.torch

    plain, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage_of = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage_of in storages else tensor
        storages.add(storage_of)
    with from_safetensors(path):
        safetensors.torch.save_file(plain, path, metadata)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises errors.DataError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise errors.DataError(
            f"{path} cannot be read as safetensors, the only kind of weights that is read here ({error})"
        ) from error


@contextlib.contextmanager
def from_safetensors(path: Path) -> Iterator[None]:
    """For a block in which safetensors writes `path`: a file like any other, and OSError where the disk does not take it."""
    import safetensors

    try:
        yield
    except safetensors.SafetensorError as error:
        # A full disk comes as "I/O error: No space left on device (os error 28)".
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from None
    # safetensors makes files that only their owner may read; as readable as the folder is what any other file would be.
    path.chmod(path.parent.stat().st_mode & 0o666)


def check_safetensors(path: Path) -> None:
    """Read a safetensors file's header, and no more. Raises errors.DataError where it is absurd or does not describe the bytes behind it."""
    import safetensors

    try:
        with safetensors.safe_open(path, "np"):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise errors.DataError(
            f"{path} is not the safetensors file it claims to be ({error}). Restore it, or type another."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Like `write`, for a value made of what JSON has. NaN and infinity are kept as Python spells them."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises errors.StorageError where it cannot be read, errors.DataError where it is not JSON."""
    with storage("read", path):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise errors.DataError(
            f"{path} is not the JSON file it claims to be: {error}. Restore it, or move it away."
        ) from None


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces. Raises errors.StorageError where it cannot be read."""
    with storage("read", path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial(path: Path) -> Path:
    """A name beside `path` that nobody else uses, for what is not finished."""
    return path.with_name(f"{PARTIAL}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}")


def clean(folder: Path) -> None:
    """Delete what dead processes left unfinished in a folder and below it, where only this process works. Raises errors.StorageError."""
    with storage("clean", folder):
        for path in sorted(folder.rglob(f"{PARTIAL}*")):
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
def storage(verb: str, path: Path) -> Iterator[None]:
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


class Digests:
    """sha256 of files and what else their bytes tell, remembered in a small SQLite file at `path` that several processes may share.

    A file is known again by (device, inode, size, mtime, ctime): whoever changes its bytes and puts size and mtime back cannot put
    ctime back. `verify=True` reads every file anyhow. A database that is broken or cannot be written only means hashing again.
    """

    __slots__ = ("_known", "_new", "path", "verify")

    _RACY = 2 * 10**9  # ns; the coarsest clock of a file system in use (FAT) ticks every 2 s
    _BATCH = 1000

    def __init__(self, path: Path, verify: bool = False):
        self.path = path
        self.verify = verify
        self._new: dict[str, tuple[str, str]] = {}
        self._known = self._read()

    def of(self, path: Path) -> str:
        """Hex sha256 of the file at `path`. Raises errors.StorageError where it cannot be read."""
        return self.remembered(path, "", lambda: sha256(path))

    def remembered(self, path: Path, what: str, make: Callable[[], str]) -> str:
        """`make()`, which tells something of the file at `path`, asked for once as long as the file stays as it is; `what` tells one question
        from another. Raises errors.StorageError where there is no such file, and what `make` raises."""
        now = time.time_ns()
        with storage("read", path):
            # Before its first byte is read: a change that comes later shows as another ctime.
            status = os.stat(path)
        name, state = _identity(status, what)
        known = self._known.get(name)
        if known and known[0] == state and not self.verify:
            return known[1]
        value = make()
        # A file changed just now may change again within the same tick of the file system's clock, and would look the same.
        if max(status.st_mtime_ns, status.st_ctime_ns) < now - self._RACY:
            self._known[name] = self._new[name] = (state, value)
            if len(self._new) >= self._BATCH:
                self.flush()
        return value

    def flush(self) -> None:
        """Write what was learnt since the last flush; call it after the last file."""
        new, self._new = self._new, {}
        rows = [(name, state, digest) for name, (state, digest) in list(new.items())]
        if not rows:
            return
        # A failure is no harm: the next process reads those files again.
        with contextlib.suppress(sqlite3.Error, OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as database, database:
                # One row a file, so edited files replace their rows; text, since an inode may exceed SQLite's signed 64 bits.
                database.execute(
                    "CREATE TABLE IF NOT EXISTS digests (file TEXT PRIMARY KEY, state TEXT, sha256 TEXT) WITHOUT ROWID"
                )
                database.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)

    def _read(self) -> dict[str, tuple[str, str]]:
        # A connection a use, never kept: SQLite must not be carried through a fork.
        with contextlib.suppress(sqlite3.Error, OSError):
            if self.path.is_file():
                with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as database:
                    rows = database.execute("SELECT file, state, sha256 FROM digests").fetchall()
                return {file: (state, digest) for file, state, digest in rows}
        return {}


def _identity(status: os.stat_result, what: str = "") -> tuple[str, str]:
    return f"{status.st_dev}:{status.st_ino}" + (
        f":{what}" if what else ""
    ), f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


class Lock:
    """A context in which this process alone owns `path`; where another live one does, it waits for it (`wait`) or raises errors.LockedError.

    The kernel frees it when its owner dies, however it dies. The file stays for ever: were it deleted, a process that has just opened it
    and one that makes a new one would both hold "the" lock.
    """

    __slots__ = ("__weakref__", "_descriptor", "path", "wait")

    def __init__(self, path: Path, wait: bool = False):
        self.path = path
        self.wait = wait
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        with storage("open the lock", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with storage("lock", self.path):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if self.wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    raise errors.LockedError(self._held(descriptor)) from None
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held_locks.add(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held_locks.discard(self)

    def _held(self, descriptor: int) -> str:
        owner = os.pread(descriptor, 400, 0).decode(errors="replace").strip() or "another process"
        return f"{self.path.parent} is in use: {owner} holds {self.path.name}. Wait for it to end or stop it; fresh=true starts a run of its own."


_held_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_locks() -> None:
    for lock in list(_held_locks):
        lock._close()


# A forked child (a loader's worker) shares the lock's open file and would hold the lock on after its parent's death.
os.register_at_fork(after_in_child=_forget_locks)
