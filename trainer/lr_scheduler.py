"""The learning rate as a function of the step alone, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.errors import Usage


@dataclass(slots=True)
class LRScheduler:
    """`warmup` counts optimizer steps of linear rise; `min_ratio` is the floor as a share of the learning rate."""

    warmup: int = 0
    min_ratio: float = 0.0

    def check(self, steps: int | None) -> None:
        if self.warmup < 0 or (steps is not None and self.warmup >= steps):
            raise Usage(f"lr_scheduler.warmup={self.warmup} does not fit into {steps} steps; type a number from 0 to {(steps or 1) - 1}")
        if not 0 <= self.min_ratio <= 1:
            raise Usage(f"lr_scheduler.min_ratio={self.min_ratio:g} is no share of the learning rate; type a number from 0 to 1")

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at optimizer step `step` (1 .. steps)."""
        if step <= self.warmup:
            return step / self.warmup
        progress = (step - 1 - self.warmup) / max(1, steps - self.warmup)
        return self.min_ratio + (1 - self.min_ratio) * self.decay(progress)

    def decay(self, progress: float) -> float:
        """From 1 at progress 0 towards 0 at progress 1."""
        raise NotImplementedError


@dataclass(slots=True)
class Constant(LRScheduler):
    def decay(self, progress: float) -> float:
        return 1.0


@dataclass(slots=True)
class Cosine(LRScheduler):
    """Half a cosine (Loshchilov & Hutter 2017, without restarts)."""

    def decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


OPTIONS = {"constant": Constant, "cosine": Cosine}
