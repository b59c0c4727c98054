"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError
from trainer.optimizer import Optimizer

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    The length of a step is proportional to that of the gradient, which Adam normalizes: hence the large learning rate.
    """

    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        if not 0 <= self.momentum < 1:
            raise UsageError(
                f"optimizer.momentum={self.momentum:g} is out of range; type a number from 0 to below 1, such as 0.9"
            )
        if self.nesterov and not self.momentum:
            raise UsageError("optimizer.nesterov=true needs momentum; type optimizer.momentum=0.9")

    def default_lr(self, suggested: float | None) -> float:
        # A constant gradient moves weights by lr / (1 - momentum) times its norm per step. With this rate, the
        # factor is 1.
        return round(1 - self.momentum, 6)

    def create(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        assert self.lr is not None
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=True,
        )
