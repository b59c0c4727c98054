"""The interface between a sweep and the system that runs its members.

An executor for another system, such as SLURM (submitit) or Ray, is a file in this package and a Hydra launcher that
creates it, see `hydra_plugins/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Generic, TypeVar

Handle = TypeVar("Handle")
"""What an executor needs to know about a member that it has started, such as a process or the ID of a job."""


class Executor(ABC, Generic[Handle]):
    """Starts, polls and stops the members of a sweep.

    The executor decides how many members run at the same time and which part of the machine or cluster each one gets.
    """

    slots: int
    """Number of members that may run at the same time."""

    def batch(self) -> AbstractContextManager[None]:
        """Returns a context in which several members are started, so that they can be submitted together."""
        return nullcontext()

    def adopt(self, log: Path) -> Handle | None:
        """Returns the member that an earlier process of the sweep has started with this `log`, if it still runs.

        None where members do not outlive the process of the sweep.
        """
        return None

    @abstractmethod
    def start(self, command: Sequence[str], environment: dict[str, str], log: Path) -> Handle | None:
        """Starts a member and returns at once. Called only while fewer than `slots` members run.

        Unless `adopt` finds it later, a member must not outlive the process of the sweep by more than the time it needs
        to save. Returns None, and starts nothing, while a member that an earlier process of the sweep has started still
        writes to `log`.

        Args:
            command: Command line of the member.
            environment: All environment variables of the member.
            log: File that receives everything the member prints. An existing file is replaced.
        """

    @abstractmethod
    def poll(self, handle: Handle) -> int | None:
        """Returns the exit code of the member, -N if signal N killed it, or None while it runs."""

    @abstractmethod
    def stop(self, handle: Handle, number: int) -> None:
        """Sends a signal to the member.

        On SIGINT and SIGTERM it saves and exits. SIGKILL also kills its child processes and must not wait for anything,
        because it is sent from a signal handler.
        """
