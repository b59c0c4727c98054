"""What a sweep runs: a plan decides which members there are, and which of them end early."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from trainer.sweep.members import Member, State, set_varied, varied_values
from trainer.sweep.ranking import edge_advice


class Plan(ABC):
    """Decides which members a sweep runs. A plan may learn from members that run or have ended."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What is run, such as "9 members"."""

    @property
    @abstractmethod
    def total(self) -> int:
        """Number of members that the sweep will have unless some end early."""

    @property
    @abstractmethod
    def searched(self) -> list[str]:
        """The settings that vary, each as `key=values`, for the name of the sweep."""

    @property
    @abstractmethod
    def is_exhausted(self) -> bool:
        """Whether there are no members after those that are known."""

    @abstractmethod
    def start(self, recorded: Sequence[Member], folder_id: str) -> list[Member]:
        """Returns the members that are known at the start of the sweep, those of earlier attempts included.

        The sweep runs those whose state is `waiting`. `recorded` are the members of earlier attempts as stored in
        `sweep.json`; `folder_id` distinguishes this sweep from others that share a storage.
        """

    @abstractmethod
    def next_member(self, members: Sequence[Member]) -> Member | None:
        """Returns a further member to run, after those of the sweep so far; None if there is none at present.

        While members run, their ends may lead to further members.
        """

    @abstractmethod
    def set_varied(self, members: Sequence[Member]) -> None:
        """Sets `varied` of all members."""

    def is_over(self, member: Member) -> bool:
        """Returns whether the same command has nothing left to do about a member."""
        return member.status == State.FINISHED

    def should_prune(self, member: Member, step: int, loss: float) -> bool:
        """Records the held-out loss of a running member. Returns whether the member should end now."""
        return False

    def record_end(self, member: Member, members: Sequence[Member]) -> None:  # noqa: B027 (most plans do not learn)
        """Records how a member ended."""

    def remarks(self, members: Sequence[Member]) -> list[str]:
        """Returns sentences about the result, for the summary of the sweep."""
        return []


class Grid(Plan):
    """Members that are all known in advance.

    Args:
        overrides: The overrides of each member.
        first: Number of members in earlier batches of the same sweep.
    """

    def __init__(self, overrides: Sequence[Sequence[str]], first: int = 0):
        self.overrides, self.first = [list(texts) for texts in overrides], first

    @property
    def description(self) -> str:
        return f"{len(self.overrides)} member{'' if len(self.overrides) == 1 else 's'}"

    @property
    def total(self) -> int:
        return self.first + len(self.overrides)

    @property
    def searched(self) -> list[str]:
        members = [Member(0, texts) for texts in self.overrides]
        set_varied(members)
        return [f"{key}={','.join(values)}" for key, values in varied_values(members).items()]

    @property
    def is_exhausted(self) -> bool:
        return True

    def start(self, recorded: Sequence[Member], folder_id: str) -> list[Member]:
        new = [Member(self.first + i, texts) for i, texts in enumerate(self.overrides, 1)]
        return [*recorded[: self.first], *new]

    def next_member(self, members: Sequence[Member]) -> Member | None:
        return None

    def set_varied(self, members: Sequence[Member]) -> None:
        set_varied(members)

    def remarks(self, members: Sequence[Member]) -> list[str]:
        advice = edge_advice(members)
        return [advice] if advice else []


def waiting(members: Sequence[Member]) -> list[Member]:
    """Returns the members that are still to run."""
    return [member for member in members if member.status == State.WAITING]
