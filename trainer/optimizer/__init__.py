"""What turns gradients into new weights. The learning rate is null in yaml: `trainer.config` resolves it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError
from trainer.core.libraries import bitsandbytes

if TYPE_CHECKING:
    import torch

    from trainer.optimizer.rounding import Rounded


@dataclass(slots=True)
class Optimizer:
    lr: float | None = None
    weight_decay: float = 0.01

    own_lr = None
    """A learning rate that holds whatever the model and method; None where theirs is meant."""
    needs_bitsandbytes = False
    takes_parts = False
    """Whether it can update tensors of which each process holds a part: torch's DTensor."""
    looks_at_all = False
    """Whether a step looks at all tensors together, so that it cannot be made of one after another."""

    def __post_init__(self) -> None:
        if self.lr is not None and not self.lr > 0:
            raise UsageError(f"optimizer.lr={self.lr:g} trains nothing; type a learning rate above 0, such as 1e-4")
        if self.weight_decay < 0:
            raise UsageError(
                f"optimizer.weight_decay={self.weight_decay:g} would make weights grow; type 0 or more, such as 0.01"
            )

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """torch's optimizer of these parameters, in one group, whose `lr` the loop sets before each step."""
        raise NotImplementedError

    def live(self, parameters: Iterable[torch.nn.Parameter], seed: int) -> torch.optim.Optimizer | Rounded:
        """The optimizer of these parameters; those in bfloat16 are rounded by chances that follow from `seed`."""
        import torch

        parameters = list(parameters)
        if all(parameter.dtype != torch.bfloat16 for parameter in parameters):
            return self.build(parameters)
        from trainer.optimizer.rounding import Rounded

        return Rounded(self.build, parameters, seed)

    def effective_lr(self, optimizer: torch.optim.Optimizer) -> float | None:
        """What an optimizer that finds its rate makes of `lr`; None where `lr` is all there is."""
        return None


@dataclass(slots=True)
class Adam(Optimizer):
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(
                f"optimizer.betas={self.betas} are not two numbers from 0 to below 1; type for example optimizer.betas=[0.9,0.999]"
            )
        if not self.eps > 0:
            raise UsageError(f"optimizer.eps={self.eps:g} may divide by zero; type a number above 0, such as 1e-8")


@dataclass(slots=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    takes_parts = True

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        # fused: one kernel over all tensors instead of some ten small ones each
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=tuple(self.betas), eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


@dataclass(slots=True)
class AdamW8bit(Adam):
    """AdamW with moments of a byte (Dettmers et al. 2022); tensors of fewer than `min_8bit_size` entries keep float32."""

    min_8bit_size: int = 4096

    needs_bitsandbytes = True

    kind = "AdamW8bit"
    """bitsandbytes' class."""

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return getattr(bitsandbytes().optim, self.kind)(
            parameters,
            lr=self.lr,
            betas=tuple(self.betas),
            eps=self.eps,
            weight_decay=self.weight_decay,
            min_8bit_size=self.min_8bit_size,
        )


@dataclass(slots=True)
class Adam8bit(AdamW8bit):
    """bitsandbytes' Adam8bit. Its weight decay is decoupled too, so that it differs from AdamW8bit in the value alone."""

    weight_decay: float = 0.0

    kind = "Adam8bit"


@dataclass(slots=True)
class Prodigy(Adam):
    """Prodigy (Mishchenko & Defazio 2024): Adam that estimates its own rate `d`, from `d0` upwards; `lr` multiplies it."""

    beta3: float | None = None
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float | None = None
    use_bias_correction: bool = True
    safeguard_warmup: bool = True
    decouple: bool = True
    slice_p: int = 1

    own_lr = 1.0
    looks_at_all = True

    def __post_init__(self) -> None:
        Adam.__post_init__(self)
        if self.beta3 is not None and not 0 <= self.beta3 < 1:
            raise UsageError(
                f"optimizer.beta3={self.beta3:g} is no number from 0 to 1; type optimizer.beta3=null for the square root of beta 2"
            )
        if not self.d0 > 0 or not self.d_coef > 0:
            raise UsageError(
                f"optimizer.d0={self.d0:g} and d_coef={self.d_coef:g} must be above 0; type optimizer.d0=1e-6 optimizer.d_coef=1"
            )
        if self.growth_rate is not None and self.growth_rate <= 1:
            raise UsageError(
                f"optimizer.growth_rate={self.growth_rate:g} keeps d at d0; type a number above 1, or null for no bound"
            )
        if self.slice_p < 1:
            raise UsageError(
                f"optimizer.slice_p={self.slice_p} looks at no entry; type 1 for all, or 11 for each eleventh"
            )

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import prodigyopt

        # It prints that it decays.
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

    def effective_lr(self, optimizer: torch.optim.Optimizer) -> float | None:
        (group,) = optimizer.param_groups
        return group["d"] * group["lr"]


@dataclass(slots=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum. Its step follows the gradient's size, not its sign as Adam's does: hence the large rate."""

    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    @property
    def own_lr(self) -> float:
        # A lasting gradient moves weights by lr / (1 - momentum) a step: 1, the length to which gradients are clipped.
        return round(1 - self.momentum, 6)

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        if not 0 <= self.momentum < 1:
            raise UsageError(
                f"optimizer.momentum={self.momentum:g} never forgets; type a number from 0 to below 1, such as 0.9"
            )
        if self.nesterov and not self.momentum:
            raise UsageError("optimizer.nesterov=true needs momentum; type optimizer.momentum=0.9")

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=True,
        )


OPTIONS = {"adamw": AdamW, "adamw8bit": AdamW8bit, "adam8bit": Adam8bit, "prodigy": Prodigy, "sgd": SGD}
