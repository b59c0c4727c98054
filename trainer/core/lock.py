"""A lock on a file that is released when its owner dies."""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from pathlib import Path
from typing import Self

from trainer.core import errors
from trainer.core.files import open_plain, storage_errors


class Lock:
    """Context manager in which this process alone owns `path`.

    If another process owns it, it waits (`wait=True`) or raises errors.LockedError, which names the owner. The kernel
    releases the lock however its owner dies. The file is never deleted: otherwise a process that has just opened it and
    a process that creates a new file could both hold "the" lock.

    The filelock package cannot replace this: it does not store the owner, filelock 3.20 truncates the owner's file when
    it tries to acquire the lock, and forked workers keep the lock.
    """

    __slots__ = ("__weakref__", "_descriptor", "path", "setting", "wait")

    def __init__(self, path: Path, wait: bool = False, setting: str = "out"):
        self.path = path
        self.wait = wait
        self.setting = setting
        """The setting that chooses the folder, see `files.storage_errors`."""
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        with storage_errors("open the lock", self.path, self.setting):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = open_plain(self.path, os.O_RDWR)
        try:
            with storage_errors("lock", self.path, self.setting):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if self.wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    raise errors.LockedError(self._refusal(descriptor)) from None
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _acquired.add(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _acquired.discard(self)

    def _refusal(self, descriptor: int) -> str:
        owner = os.pread(descriptor, 400, 0).decode(errors="replace").strip() or "another process"
        return (
            f"{self.path.parent} is in use: {owner} holds {self.path.name}. Wait for it to end or stop it; fresh=true "
            "starts a new run."
        )


_acquired: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_inherited_locks() -> None:
    for lock in list(_acquired):
        lock._close()


# A forked child, such as a loader worker, inherits the open file and would hold the lock after its parent's death.
os.register_at_fork(after_in_child=_close_inherited_locks)
