"""Constant learning rate after the warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.lr_scheduler import LRScheduler


@dataclass(slots=True)
class Constant(LRScheduler):
    """No decay."""

    def decay(self, progress: float) -> float:
        return 1.0
