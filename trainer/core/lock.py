"""A lock on a file."""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from pathlib import Path
from typing import Self

from trainer.core import errors
from trainer.core.files import storage_errors


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
        with storage_errors("open the lock", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with storage_errors("lock", self.path):
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
