"""SIGINT and SIGTERM as an exception that comes at once, but never in the middle of an update or a save."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.core.errors import Interrupted


class Signals:
    """While open, the first SIGINT or SIGTERM raises errors.Interrupted, at the end of the block that holds it back; a second ends the
    process at once. Only one is open in a process, in its main thread."""

    def __init__(self) -> None:
        self._held = 0
        self._waiting = False
        self._seen = 0
        self._process = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._held:
            # After `note` the process is ending, and has the time to say why.
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What must not be torn: a signal that comes inside is raised at the end."""
        seen = self._seen
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._seen != seen and not self._held and not self._waiting:
            raise Interrupted(self._seen)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """What must not be torn and whose end is no place to stop at either: a signal that comes inside is only `seen`."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    @contextmanager
    def until_released(self) -> Iterator[None]:
        """What must not be torn, and all that follows up to `release`: a signal that comes meanwhile is only `seen`."""
        self._waiting = True
        yield

    def release(self) -> None:
        """The end of `until_released`."""
        self._waiting = False

    def note(self) -> None:
        """From now on a signal is only `seen`, to the end of the process; a second one still ends it."""
        self._held += 1

    @property
    def seen(self) -> int:
        """The number of the first signal that came, 0 before."""
        return self._seen

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:
            # A child that was forked a moment ago, and has not come to `in_worker` yet.
            in_worker()
            os.kill(os.getpid(), number)
            return
        if self._seen:
            os._exit(128 + number)
        self._seen = number
        if not self._held and not self._waiting:
            raise Interrupted(number)


def in_worker() -> None:
    """For child processes: Ctrl-C in a terminal reaches them too, and is their parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
