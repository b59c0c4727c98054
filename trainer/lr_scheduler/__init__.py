"""Learning-rate schedules. They are functions of the step alone, so a resumed run needs no schedule state."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.core.errors import UsageError


@dataclass(slots=True)
class LRScheduler:
    """Base class of the schedules: linear warm-up, then decay to a floor. An option overrides `decay`."""

    warmup: int = 0
    """Number of optimizer steps in which the learning rate rises linearly."""
    min_ratio: float = 0.0
    """Floor of the decay, as a fraction of the learning rate."""

    def check(self, steps: int | None) -> None:
        """Raises errors.UsageError if the settings are invalid for a run of this many steps (None: unknown)."""
        if self.warmup < 0 or (steps is not None and self.warmup >= steps):
            raise UsageError(
                f"lr_scheduler.warmup={self.warmup} does not fit into {steps} steps; "
                f"type a number from 0 to {(steps or 1) - 1}"
            )
        if not 0 <= self.min_ratio <= 1:
            raise UsageError(
                f"lr_scheduler.min_ratio={self.min_ratio:g} must be a fraction of the learning rate; "
                "type a number from 0 to 1"
            )

    def factor(self, step: int, steps: int) -> float:
        """Returns the factor of the learning rate at optimizer step `step` (1 .. steps).

        The first step of a warm-up has a positive rate; in diffusers and transformers its rate is 0. After the warm-up,
        all three are equal.
        """
        if step <= self.warmup:
            return step / self.warmup
        progress = (step - 1 - self.warmup) / max(1, steps - self.warmup)
        return self.min_ratio + (1 - self.min_ratio) * self.decay(progress)

    def decay(self, progress: float) -> float:
        """Returns the decay, which falls from 1 at progress 0 towards 0 at progress 1."""
        raise NotImplementedError
