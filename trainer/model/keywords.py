"""What sampling needs of a family that writes keywords for its images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    from trainer.core.batch import Example


@runtime_checkable
class KeywordWriter(Protocol):
    """A model family whose images follow keywords of a target and of a user's preference."""

    def keywords_of(self, example: Example) -> tuple[str, str]:
        """Returns the keywords of the target and of the preference."""

    def with_preference_weight(self, weight: float) -> Self:
        """Returns the family with another weight of the preference."""
