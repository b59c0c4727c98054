"""Prodigy, which estimates its learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError
from trainer.optimizer.adam import Adam

if TYPE_CHECKING:
    import torch

    from trainer.optimizer.stochastic_rounding import StochasticRounding


@dataclass(slots=True)
class Prodigy(Adam):
    """Adam with an estimated learning rate `d` (Mishchenko & Defazio 2024), which `lr` multiplies."""

    beta3: float | None = None
    """Decay rate of the estimate; null: the square root of the second beta."""
    d0: float = 1e-6
    """Initial value of `d`, which never falls below it."""
    d_coef: float = 1.0
    """Factor by which the estimate is multiplied."""
    growth_rate: float | None = None
    """Largest factor by which `d` grows in one step; null: unlimited."""
    use_bias_correction: bool = True
    safeguard_warmup: bool = True
    decouple: bool = True
    """Whether weight decay is decoupled, as in AdamW."""
    slice_p: int = 1
    """`d` is estimated from every `slice_p`-th entry of each tensor."""

    updates_jointly = True

    def __post_init__(self) -> None:
        Adam.__post_init__(self)
        if self.beta3 is not None and not 0 <= self.beta3 < 1:
            raise UsageError(
                f"optimizer.beta3={self.beta3:g} must be from 0 to below 1; "
                "type optimizer.beta3=null for the square root of the second beta"
            )
        if not self.d0 > 0 or not self.d_coef > 0:
            raise UsageError(
                f"optimizer.d0={self.d0:g} and d_coef={self.d_coef:g} must be above 0; "
                "type optimizer.d0=1e-6 optimizer.d_coef=1"
            )
        if self.growth_rate is not None and self.growth_rate <= 1:
            raise UsageError(
                f"optimizer.growth_rate={self.growth_rate:g} keeps d at d0; type a number above 1, or null for no limit"
            )
        if self.slice_p < 1:
            raise UsageError(
                f"optimizer.slice_p={self.slice_p} uses no entries; type 1 for all, or 11 for every eleventh"
            )

    def default_lr(self, suggested: float | None) -> float:
        return 1.0

    def create(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import prodigyopt

        # The constructor prints a line about weight decay.
        with redirect_stdout(StringIO()):
            return prodigyopt.Prodigy(
                parameters,
                lr=self.lr,
                betas=tuple(self.betas),
                beta3=self.beta3,
                eps=self.eps,
                weight_decay=self.weight_decay,
                decouple=self.decouple,
                use_bias_correction=self.use_bias_correction,
                safeguard_warmup=self.safeguard_warmup,
                d0=self.d0,
                d_coef=self.d_coef,
                growth_rate=float("inf") if self.growth_rate is None else self.growth_rate,
                slice_p=self.slice_p,
            )

    def effective_lr(self, optimizer: torch.optim.Optimizer | StochasticRounding) -> float:
        (group,) = optimizer.param_groups
        return group["d"] * group["lr"]
