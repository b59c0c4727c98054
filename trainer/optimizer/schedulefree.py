"""AdamW without a schedule: the result is an average of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError
from trainer.optimizer.adam import Adam

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class ScheduleFree(Adam):
    """AdamWScheduleFree (Defazio et al. 2024).

    Gradients are computed at the weights y. The average x of the sequence z is evaluated and exported. Both y and x are
    in a checkpoint, so evaluations do not round the weights that train, as `optimizer.eval()` would.
    """

    r: float = 0.0
    """Exponent of the step in the weight of a step in the average."""
    weight_lr_power: float = 2.0
    """Exponent of the largest learning rate so far in the same weight."""

    updates_jointly = True
    averages_weights = True

    def __post_init__(self) -> None:
        Adam.__post_init__(self)
        if not self.betas[0] > 0:
            raise UsageError(
                "optimizer.betas: the first number is the share of the average in the weights that train, and must be "
                "above 0; type optimizer.betas=[0.9,0.999]"
            )

    def create(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(
            parameters,
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
            r=self.r,
            weight_lr_power=self.weight_lr_power,
        )
        optimizer.train()
        return optimizer

    def write_average(self, optimizer: torch.optim.Optimizer, average: Iterable[torch.Tensor]) -> None:
        import torch

        (group,) = optimizer.param_groups
        for mean, parameter in zip(average, group["params"], strict=True):
            mean.copy_(parameter.detach())
            state = optimizer.state.get(parameter, {})
            if "z" in state:  # absent before the first gradient
                # y = beta1 x + (1 - beta1) z, solved for x.
                torch.lerp(mean, state["z"].to(mean.dtype), 1 - 1 / self.betas[0], out=mean)
