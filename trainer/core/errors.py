"""Exceptions that end a run, each with its exit code.

The message is what the user reads: one clear paragraph that says what is wrong, where, and what to type instead. Exit
codes follow sysexits.h where it has one, and the shell's convention of 128 + signal for interruptions.
"""

from __future__ import annotations

import errno


class TrainerError(Exception):
    """An expected way for a run to end. `code` is the exit code of the process."""

    code = 1


class UsageError(TrainerError):
    """A setting is unknown, impossible or contradicts another."""

    code = 64


class DataError(TrainerError):
    """A dataset, cache entry or checkpoint is invalid or damaged."""

    code = 65


class WeightsError(TrainerError):
    """Weights are not available: offline, gated or a mistyped name."""

    code = 69


class InstallationError(TrainerError):
    """A Python package is not installed, or the interpreter is too old."""

    code = 69


class NonFiniteError(TrainerError):
    """A loss or gradient is NaN or infinite."""

    code = 70


class OutOfMemoryError(TrainerError):
    """Memory does not suffice, not even for a single sample."""

    code = 71


class StorageError(TrainerError):
    """A file cannot be read or written, or a worker process died."""

    code = 74


class LockedError(TrainerError):
    """Another running process owns the run folder."""

    code = 75


class FollowerExit(TrainerError):
    """Ends a follower process without a message, because the main process ended with this code and has printed why."""

    def __init__(self, code: int):
        super().__init__()
        self.code = code


class Interrupted(BaseException):
    """SIGINT (exit code 130) or SIGTERM (143) arrived.

    Like KeyboardInterrupt this is not an Exception: it may be raised anywhere, and libraries catch Exception around
    imports and while they read files.
    """

    CTRL_C = 130

    def __init__(self, signal: int):
        super().__init__(f"stopped by {'Ctrl-C' if signal == 2 else 'SIGTERM'}")
        self.code = 128 + signal

    def add_outcome(self, text: str) -> None:
        """Adds to the message what became of the work."""
        self.args = (f"{self}: {text}",)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the error is a failed allocation: in Python, in torch on any device, or in another library."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    phrases = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    )
