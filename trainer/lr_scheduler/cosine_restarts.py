"""Cosine decay with restarts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.core.errors import UsageError
from trainer.lr_scheduler import LRScheduler


@dataclass(slots=True)
class CosineRestarts(LRScheduler):
    """Cosine decay that restarts from the full learning rate (Loshchilov & Hutter 2017)."""

    cycles: int = 2
    """Number of decays."""

    def check(self, steps: int | None) -> None:
        LRScheduler.check(self, steps)
        if self.cycles < 1:
            raise UsageError(f"lr_scheduler.cycles={self.cycles} is too few; type 1 or more")
        if steps is not None and self.cycles > steps - self.warmup:
            raise UsageError(
                f"lr_scheduler.cycles={self.cycles} do not fit into the {steps - self.warmup} steps after the warm-up; "
                "type fewer"
            )

    def decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * (self.cycles * progress % 1)))
