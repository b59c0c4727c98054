"""Optimizers: the settings that all options share. `trainer.config` resolves a learning rate that is null in yaml."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError

if TYPE_CHECKING:
    import torch

    from trainer.optimizer.stochastic_rounding import StochasticRounding


def check_betas(betas: list[float], example: str) -> None:
    """Raises errors.UsageError unless `betas` are two decay rates; `example` is what to type instead."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UsageError(
            f"optimizer.betas={betas} must be two numbers from 0 to below 1; type for example optimizer.betas={example}"
        )


@dataclass(slots=True)
class Optimizer:
    """Base class of the optimizer settings; an option overrides `create`."""

    lr: float | None = None
    """Learning rate; null: the default of the optimizer, or of the model and method."""
    weight_decay: float = 0.01

    needs_bitsandbytes = False
    supports_sharding = False
    """Whether it can update tensors that are sharded across processes (torch's DTensor)."""
    updates_jointly = False
    """Whether a step needs all tensors at once, so that they cannot be updated one after another."""
    averages_weights = False
    """Whether training results in an average that the optimizer keeps, instead of the weights that it updates."""

    def __post_init__(self) -> None:
        if self.lr is not None and not self.lr > 0:
            raise UsageError(f"optimizer.lr={self.lr:g} trains nothing; type a learning rate above 0, such as 1e-4")
        if self.weight_decay < 0:
            raise UsageError(
                f"optimizer.weight_decay={self.weight_decay:g} would make weights grow; type 0 or more, such as 0.01"
            )

    def default_lr(self, suggested: float | None) -> float | None:
        """Returns the default learning rate; None if there is none.

        `suggested` is the one that the model suggests for AdamW and the method, None if it suggests none.
        """
        return suggested

    def check(self) -> None:
        """Raises an error if the optimizer cannot be created, for example because its package is not installed."""
        import torch

        self.create([torch.nn.Parameter(torch.zeros(1))])

    def create(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Returns the torch optimizer with one parameter group, whose `lr` the training loop sets before each step."""
        raise NotImplementedError

    def build(self, parameters: Iterable[torch.nn.Parameter], seed: int) -> torch.optim.Optimizer | StochasticRounding:
        """Returns the optimizer to train with, which rounds bfloat16 parameters stochastically, seeded by `seed`."""
        import torch

        parameters = list(parameters)
        if all(parameter.dtype != torch.bfloat16 for parameter in parameters):
            return self.create(parameters)
        from trainer.optimizer.stochastic_rounding import StochasticRounding

        return StochasticRounding(self.create, parameters, seed)

    def write_average(self, optimizer: torch.optim.Optimizer, average: Iterable[torch.Tensor]) -> None:
        """Writes the averages that the optimizer keeps into float32 tensors, in the order of its parameters.

        Only for options with `averages_weights`.
        """
        raise NotImplementedError

    def effective_lr(self, optimizer: torch.optim.Optimizer | StochasticRounding) -> float | None:
        """Returns the learning rate that the optimizer has estimated; None if it uses `lr` as it is."""
        return None
