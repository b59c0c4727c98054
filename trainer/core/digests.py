"""sha256 of files, remembered between processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from trainer.core.files import storage_errors


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces. Raises errors.StorageError where it cannot be read."""
    with storage_errors("read", path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        with storage_errors("read", path):
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
