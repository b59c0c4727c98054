"""What a resumed run must know besides weights and optimizer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from trainer.precision.loss_scale import LossScale


@dataclass(slots=True)
class TrainingState:
    """Progress of a run.

    Checkpoints store it under the names of these fields, so renaming one breaks old checkpoints.
    """

    evaluated: int | None = None
    """Step of the last evaluation."""
    val_loss: float | None = None
    """Held-out loss of the last evaluation."""
    best: float | None = None
    """Lowest finite held-out loss."""
    since_best: int = 0
    """Number of evaluations since the lowest loss."""
    skipped: int = 0
    """Number of consecutive steps, up to the last one, that were not finite."""
    loss_scale: dict[str, float] | None = None
    """Fields of the `LossScale`, if the precision needs one."""

    @classmethod
    def from_checkpoint(cls, values: dict[str, Any]) -> Self:
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def to_checkpoint(self, step: int, loss_scale: LossScale | None) -> dict[str, Any]:
        """Returns the state to save with the weights of a step, whose `val_loss` must be that of these weights."""
        values = asdict(self)
        if self.evaluated != step:
            values["val_loss"] = None
        del values["loss_scale"]
        return values if loss_scale is None else values | {"loss_scale": asdict(loss_scale)}

    def record_evaluation(self, step: int, loss: float | None) -> bool:
        """Records a held-out loss. Returns whether it is the lowest so far."""
        is_best = loss is not None and math.isfinite(loss) and (self.best is None or loss < self.best)
        self.evaluated, self.val_loss = step, loss
        if is_best:
            self.best, self.since_best = loss, 0
        else:
            self.since_best += 1
        return is_best
