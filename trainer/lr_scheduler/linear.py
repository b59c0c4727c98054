"""Linear decay."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.lr_scheduler import LRScheduler


@dataclass(slots=True)
class Linear(LRScheduler):
    """Linear decay to the floor."""

    def decay(self, progress: float) -> float:
        return 1 - progress
