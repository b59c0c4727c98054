"""How a run ends other than by finishing: one exception a cause, each with its exit code.

The message is what the user reads: one clear paragraph that says what is wrong, where, and what to type instead.
The codes follow sysexits.h where it has one, and the shell's 128 + signal for interruptions.
"""

from __future__ import annotations

import errno


class TrainerError(Exception):
    """A known way for a run to end; `code` is what the process returns."""

    code = 1


class UsageError(TrainerError):
    """A setting that is unknown, impossible or contradicts another."""

    code = 64


class DataError(TrainerError):
    """A data set, cache entry or checkpoint that cannot be read as what it claims to be."""

    code = 65


class WeightsError(TrainerError):
    """Weights that are not to be had: offline, gated, mistyped."""

    code = 69


class NonFiniteError(TrainerError):
    """A loss or gradient that is not finite."""

    code = 70


class OutOfMemoryError(TrainerError):
    """The device has no room for the smallest piece of work."""

    code = 71


class StorageError(TrainerError):
    """A file that cannot be written or read, a loader process that died."""

    code = 74


class LockedError(TrainerError):
    """Another live process owns the run folder."""

    code = 75


class FollowerExit(TrainerError):
    """Of several processes that train together the main one has ended with this code, and has said why."""

    def __init__(self, code: int):
        super().__init__()
        self.code = code


class Interrupted(BaseException):
    """SIGINT (130) or SIGTERM (143); state up to the last finished step is kept.

    No Exception, as KeyboardInterrupt is none: it may come anywhere, and libraries catch Exception around imports and readers of files.
    """

    def __init__(self, signal: int):
        super().__init__(f"stopped by {'Ctrl-C' if signal == 2 else 'SIGTERM'}")
        self.code = 128 + signal


def is_out_of_memory(error: BaseException) -> bool:
    """Whether what failed is an allocation: Python's, torch's on any device, or that of a library below."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
