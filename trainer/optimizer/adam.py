"""Settings that Adam and its variants share."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.core.errors import UsageError
from trainer.optimizer import Optimizer, check_betas


@dataclass(slots=True)
class Adam(Optimizer):
    """Base class of the settings of Adam's variants."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the first and second moment."""
    eps: float = 1e-8

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        check_betas(self.betas, "[0.9,0.999]")
        if not self.eps > 0:
            raise UsageError(f"optimizer.eps={self.eps:g} could divide by zero; type a number above 0, such as 1e-8")
