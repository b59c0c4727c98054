"""Adafactor, whose second moments take almost no memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError
from trainer.optimizer import Optimizer

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Adafactor(Optimizer):
    """Adafactor of transformers (Shazeer & Stern 2018) with the learning rate of the schedule.

    The second moment of a matrix is kept as one number for each row and column. The learning rate that the paper
    derives from the step (`relative_step`) is left out: it would ignore `lr` and `lr_scheduler`.
    """

    weight_decay: float = 0.0
    eps: list[float] = field(default_factory=lambda: [1e-30, 1e-3])
    """Lower bounds of the squared gradient, and of the norm of a tensor where `scale_parameter` multiplies by it."""
    clip_threshold: float = 1.0
    """Largest root mean square of an update, before it is multiplied by the learning rate."""
    decay_rate: float = -0.8
    """Exponent of the step in the decay of the second moment."""
    beta1: float | None = None
    """Decay of the first moment; null: there is none, which saves 4 bytes per parameter."""
    scale_parameter: bool = False
    """Whether the learning rate of a tensor is multiplied by its root mean square."""

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        if len(self.eps) != 2 or not all(value > 0 for value in self.eps):
            raise UsageError(f"optimizer.eps={self.eps} must be two numbers above 0; type optimizer.eps=[1e-30,1e-3]")
        if not self.clip_threshold > 0:
            raise UsageError(
                f"optimizer.clip_threshold={self.clip_threshold:g} prevents every update; type a number above 0, such "
                "as 1"
            )
        if not self.decay_rate < 0:
            raise UsageError(f"optimizer.decay_rate={self.decay_rate:g} must be below 0; type for example -0.8")
        if self.beta1 is not None and not 0 <= self.beta1 < 1:
            raise UsageError(
                f"optimizer.beta1={self.beta1:g} must be from 0 to below 1; type 0.9, or null for no first moment"
            )

    def create(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor as TransformersAdafactor

        return TransformersAdafactor(
            parameters,
            lr=self.lr,
            eps=(self.eps[0], self.eps[1]),
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            beta1=self.beta1,
            weight_decay=self.weight_decay,
            scale_parameter=self.scale_parameter,
            relative_step=False,
            warmup_init=False,
        )
