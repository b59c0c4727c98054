"""Runs the members of a sweep as processes on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trainer.core import files
from trainer.sweep.executors import Executor
from trainer.sweep.members import LIFELINE_VARIABLE


@cache
def lifeline() -> int:
    """Returns the end of a pipe for members to read from, whose other end closes when this process ends or is killed.

    Every system has pipes, and the members notice the end of a process that had no time to tell them.
    """
    reading_end, _ = os.pipe()
    return reading_end


@dataclass(slots=True, frozen=True)
class LocalProcess:
    """A member, and the slot that it occupies."""

    process: subprocess.Popen[bytes]
    slot: int


class LocalExecutor(Executor[LocalProcess]):
    """Runs up to `slots` members at a time. Each slot gets one GPU, if there are any, and its share of the cores."""

    def __init__(self, slots: int = 1):
        self.slots = max(1, slots)
        self._free = set(range(self.slots))

    def start(self, command: Sequence[str], environment: dict[str, str], log: Path) -> LocalProcess | None:
        slot = min(self._free)
        with files.storage_errors("write", log), open(log, "ab") as output:
            # The member inherits the open file, and with it the lock, which lasts until all its processes have ended.
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            output.truncate(0)
            # In a session of its own: Ctrl-C in a terminal then reaches the member only once, through the sweep.
            process = subprocess.Popen(
                command,
                env=environment | self._machine_share(slot) | {LIFELINE_VARIABLE: str(lifeline())},
                pass_fds=(lifeline(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._free.discard(slot)
        return LocalProcess(process, slot)

    def poll(self, handle: LocalProcess) -> int | None:
        code = handle.process.poll()
        if code is not None:
            self._free.add(handle.slot)
        return code

    def stop(self, handle: LocalProcess, number: int) -> None:
        if number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(handle.process.pid, signal.SIGKILL)
        else:
            handle.process.send_signal(number)

    def _machine_share(self, slot: int) -> dict[str, str]:
        """Returns the environment variables that limit a member to the GPU and the cores of its slot."""
        if self.slots == 1:
            return {}
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            gpus = visible.split(",")
        else:
            gpus = [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
        share = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
        if "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.slots))
        return share
