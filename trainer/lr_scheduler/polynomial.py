"""Polynomial decay."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.core.errors import UsageError
from trainer.lr_scheduler import LRScheduler


@dataclass(slots=True)
class Polynomial(LRScheduler):
    """(1 - progress) to the power of `power`."""

    power: float = 2.0
    """1 is linear; a larger power decays faster at first."""

    def check(self, steps: int | None) -> None:
        LRScheduler.check(self, steps)
        if not self.power > 0:
            raise UsageError(
                f"lr_scheduler.power={self.power:g} does not decay; "
                "type a number above 0, such as 2, or lr_scheduler=constant"
            )

    def decay(self, progress: float) -> float:
        return (1 - progress) ** self.power
