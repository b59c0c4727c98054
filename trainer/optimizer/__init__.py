"""What turns gradients into new weights. The learning rate is null in yaml: `trainer.config` resolves it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.errors import Usage

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Optimizer:
    lr: float | None = None
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.lr is not None and not self.lr > 0:
            raise Usage(f"optimizer.lr={self.lr:g} trains nothing; type a learning rate above 0, such as 1e-4")

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        raise NotImplementedError


@dataclass(slots=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise Usage(f"optimizer.betas={self.betas} are not two numbers from 0 to 1; type for example optimizer.betas=[0.9,0.999]")

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        import torch

        # fused: one kernel over all tensors instead of some ten small ones each
        return torch.optim.AdamW(parameters, lr=self.lr, betas=tuple(self.betas), eps=self.eps, weight_decay=self.weight_decay, fused=True)


OPTIONS = {"adamw": AdamW}
