"""The learning rate as a function of the step alone, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.core.errors import UsageError


@dataclass(slots=True)
class LRScheduler:
    """`warmup` counts optimizer steps of linear rise; `min_ratio` is the floor as a share of the learning rate."""

    warmup: int = 0
    min_ratio: float = 0.0

    def check(self, steps: int | None) -> None:
        if self.warmup < 0 or (steps is not None and self.warmup >= steps):
            raise UsageError(
                f"lr_scheduler.warmup={self.warmup} does not fit into {steps} steps; type a number from 0 to {(steps or 1) - 1}"
            )
        if not 0 <= self.min_ratio <= 1:
            raise UsageError(
                f"lr_scheduler.min_ratio={self.min_ratio:g} is no share of the learning rate; type a number from 0 to 1"
            )

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at optimizer step `step` (1 .. steps).

        The first step of a warm-up already moves, where diffusers' and transformers' has the rate 0; after it all three agree.
        """
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
class Linear(LRScheduler):
    def decay(self, progress: float) -> float:
        return 1 - progress


@dataclass(slots=True)
class Cosine(LRScheduler):
    """Half a cosine (Loshchilov & Hutter 2017, without restarts)."""

    def decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(slots=True)
class CosineRestarts(LRScheduler):
    """`cycles` times half a cosine, each from the full rate (Loshchilov & Hutter 2017)."""

    cycles: int = 2

    def check(self, steps: int | None) -> None:
        LRScheduler.check(self, steps)
        if self.cycles < 1:
            raise UsageError(f"lr_scheduler.cycles={self.cycles} is no number of falls; type 1 or more")
        if steps is not None and self.cycles > steps - self.warmup:
            raise UsageError(
                f"lr_scheduler.cycles={self.cycles} do not fit into the {steps - self.warmup} steps after warm-up; type fewer"
            )

    def decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * (self.cycles * progress % 1)))


@dataclass(slots=True)
class Polynomial(LRScheduler):
    """What remains of the run, to the power of `power`: 1 is linear, 2 falls faster at first."""

    power: float = 2.0

    def check(self, steps: int | None) -> None:
        LRScheduler.check(self, steps)
        if not self.power > 0:
            raise UsageError(
                f"lr_scheduler.power={self.power:g} does not fall; type a number above 0, such as 2, or lr_scheduler=constant"
            )

    def decay(self, progress: float) -> float:
        return (1 - progress) ** self.power


OPTIONS = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "cosine_restarts": CosineRestarts,
    "polynomial": Polynomial,
}
