"""Turns SIGINT and SIGTERM into an exception that never interrupts a weight update or a save."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from trainer.core.errors import Interrupted

IMPORT_PATIENCE = 2.0
"""Seconds that the first signal waits for an import, since the program has to save and exit within seconds."""
POLL_INTERVAL = 0.02
"""Seconds between two checks of whether the import has ended."""
_IMPORT_MACHINERY = "<frozen importlib._bootstrap>"


class Signals:
    """Context manager that handles SIGINT and SIGTERM. Only one may be open at a time.

    The first signal raises `errors.Interrupted`, at once or later:

    - by default: at once, wherever the program is. If it is importing a module: when the import ends, because an
      exception would leave a half-imported module behind, which fails when it is imported again, or get lost in the
      module. With `exits`, a long import is interrupted after IMPORT_PATIENCE all the same;
    - inside `deferred`: when the block ends;
    - inside `recorded`, after `record_only`, and from the start of `deferred_until_release` until `release`: never. The
      signal is only stored in `seen`, and the caller decides when to stop.

    A second signal ends the process immediately in all states. With `exits=False`, for a process that is not the
    program's own, such as the kernel of a notebook, a second signal raises `errors.Interrupted` at once in all states.
    The files on disk survive both.

    Python delivers signals only to the main thread. In any other thread, this changes no signal handlers.
    """

    def __init__(self, exits: bool = True) -> None:
        self._exits = exits
        self._deferrals = 0
        self._awaits_release = False
        self._seen = 0
        self._waits_for_import = False
        self._import_deadline = 0.0
        self._outer_imports = 0
        self._process = os.getpid()
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # A script may start a run while it is imported itself.
        self._outer_imports = _count_imports(sys._getframe())
        for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread() else ():
            self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._deferrals and self._exits:
            # After `record_only` the process is about to end; keep the handlers so that it can still print why.
            return
        if self._waits_for_import:
            self._stop_waiting()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defers signals inside the block. Raises `errors.Interrupted` at its end if one arrived.

        Raises it at the start if one arrived during an import that has just ended.
        """
        if self._waits_for_import and not self._deferrals and not self._awaits_release:
            self._interrupt()
        seen = self._seen
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1
        if self._seen != seen and not self._deferrals and not self._awaits_release:
            raise Interrupted(self._seen)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Defers signals inside the block and does not raise when it ends; check `seen`."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1

    @contextmanager
    def deferred_until_release(self) -> Iterator[None]:
        """Only records signals from the start of the block until `release` is called, which may be after its end."""
        self._awaits_release = True
        yield

    def release(self) -> None:
        """Ends the deferral that `deferred_until_release` started. Does not raise; check `seen`."""
        self._awaits_release = False

    def record_only(self) -> None:
        """Only records signals from now until the process ends. A second signal still ends the process."""
        self._deferrals += 1

    @property
    def seen(self) -> int:
        """Number of the first signal that arrived, or 0. Whoever reads it decides when to stop."""
        if self._waits_for_import:
            self._stop_waiting()
        return self._seen

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A newly forked worker that has not called `reset_worker_signals` yet.
            reset_worker_signals()
            os.kill(os.getpid(), number)
            return
        if self._seen and self._exits:
            os._exit(128 + number)
        if self._seen:
            raise Interrupted(number)
        self._seen = number
        self._import_deadline = time.monotonic() + IMPORT_PATIENCE
        self._interrupt_or_wait(frame)

    def _interrupt_or_wait(self, frame: FrameType | None) -> None:
        """Raises errors.Interrupted unless signals are deferred; during an import, tries again a little later."""
        if self._deferrals or self._awaits_release:
            return
        is_late = self._exits and time.monotonic() > self._import_deadline
        if is_late or _count_imports(frame) <= self._outer_imports:
            self._interrupt()
        if not self._waits_for_import:
            self._waits_for_import = True
            previous = signal.signal(signal.SIGALRM, lambda number, frame: self._interrupt_or_wait(frame))
            self._previous_handlers.setdefault(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, POLL_INTERVAL)

    def _interrupt(self) -> NoReturn:
        if self._waits_for_import:
            self._stop_waiting()
        raise Interrupted(self._seen)

    def _stop_waiting(self) -> None:
        self._waits_for_import = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def _count_imports(frame: FrameType | None) -> int:
    """Returns the number of frames of Python's import machinery among a frame and its callers."""
    count = 0
    while frame:
        count += frame.f_code.co_filename == _IMPORT_MACHINERY
        frame = frame.f_back
    return count


def in_main_thread() -> bool:
    """Returns whether this is the main thread, the only one that can set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def reset_worker_signals() -> None:
    """Call this in worker processes: SIGINT is ignored, SIGTERM ends the worker.

    A terminal sends Ctrl-C to the workers too, but only the main process should react to it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
