"""sha256 of files, and a database that remembers them."""

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
    """Returns the hex sha256 of a file. Raises errors.StorageError if it cannot be read."""
    with storage_errors("read", path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """Remembers sha256 digests and other facts about files in a SQLite database, which processes may share.

    A file counts as unchanged if its device, inode, size, mtime and ctime are: a program that changes its bytes can
    restore its size and mtime, but not its ctime. With `verify=True` every file is read again.

    A database that is damaged or not writable is ignored; files are then read again.
    """

    __slots__ = ("_known", "_unsaved", "path", "verify")

    _RACY = 2 * 10**9
    """A file that changed less than this many nanoseconds ago is not remembered. The clock of FAT ticks every 2 s."""
    _FLUSH_EVERY = 1000

    def __init__(self, path: Path, verify: bool = False):
        self.path = path
        self.verify = verify
        self._unsaved: dict[str, tuple[str, str]] = {}
        self._known = self._read()

    def sha256(self, path: Path) -> str:
        """Returns the hex sha256 of a file. Raises errors.StorageError if it cannot be read."""
        return self.get_or_compute(path, "", lambda: sha256(path))

    def get_or_compute(self, path: Path, key: str, compute: Callable[[], str]) -> str:
        """Returns the result of `compute()`, a function of the file's bytes, which is called again only if the file
        changes.

        `key` names the fact about the file. Raises errors.StorageError if the file does not exist, and what `compute`
        raises.
        """
        now = time.time_ns()
        with storage_errors("read", path):
            # Before the first byte is read, so that a later change gives the file a new ctime.
            status = os.stat(path)
        name, state = _row_of(status, key)
        known = self._known.get(name)
        if known and known[0] == state and not self.verify:
            return known[1]
        value = compute()
        # A file that changed just now may change again within the same tick of the file system's clock, which would not
        # be noticed, so it is not remembered.
        if max(status.st_mtime_ns, status.st_ctime_ns) < now - self._RACY:
            self._known[name] = self._unsaved[name] = (state, value)
            if len(self._unsaved) >= self._FLUSH_EVERY:
                self.flush()
        return value

    def flush(self) -> None:
        """Writes new facts to the database. Call this after the last file."""
        unsaved, self._unsaved = self._unsaved, {}
        rows = [
            (name, f"{state} {_check(name, state, value)}", value) for name, (state, value) in list(unsaved.items())
        ]
        if not rows:
            return
        # A failure does no harm: the next process reads those files again.
        with contextlib.suppress(sqlite3.Error, OSError, ValueError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as database, database:
                # One row per file and key, so that edited files replace their rows. Columns are text because an inode
                # may exceed SQLite's signed 64 bits.
                database.execute(
                    "CREATE TABLE IF NOT EXISTS digests (file TEXT PRIMARY KEY, state TEXT, sha256 TEXT) WITHOUT ROWID"
                )
                database.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)

    def _read(self) -> dict[str, tuple[str, str]]:
        # Every use opens a connection of its own: SQLite connections must not be used across a fork.
        # A damaged text raises UnicodeDecodeError, a ValueError.
        with contextlib.suppress(sqlite3.Error, OSError, ValueError):
            if self.path.is_file():
                with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as database:
                    rows = database.execute("SELECT file, state, sha256 FROM digests").fetchall()
                return {row[0]: fact for row in rows if (fact := _parse_row(*row)) is not None}
        return {}


def _parse_row(name: object, state_and_check: object, value: object) -> tuple[str, str] | None:
    """Returns the state and the value of a row; None if the row was damaged."""
    if not isinstance(name, str) or not isinstance(state_and_check, str) or not isinstance(value, str):
        return None
    state, _, check = state_and_check.rpartition(" ")
    return (state, value) if check == _check(name, state, value) else None


def _check(name: str, state: str, value: str) -> str:
    """Returns a digest of a row. SQLite does not notice when bytes of a row change."""
    return hashlib.sha256(f"{name}\0{state}\0{value}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _row_of(status: os.stat_result, key: str = "") -> tuple[str, str]:
    """Returns the primary key of a file's row and the state in which its value is valid."""
    name = f"{status.st_dev}:{status.st_ino}" + (f":{key}" if key else "")
    return name, f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
