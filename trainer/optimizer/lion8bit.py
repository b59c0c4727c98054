"""Lion of bitsandbytes, with an 8-bit moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.core.libraries import import_bitsandbytes
from trainer.optimizer import Optimizer, check_betas

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Lion8bit(Optimizer):
    """Lion (Chen et al. 2023) with an 8-bit moment: each weight moves by the learning rate, up or down."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Shares of the moment in the direction of a step, and in the next moment."""
    min_8bit_size: int = 4096
    """Tensors with fewer entries keep a float32 moment."""

    needs_bitsandbytes = True

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        check_betas(self.betas, "[0.9,0.99]")

    def default_lr(self, suggested: float | None) -> float | None:
        # The paper recommends rates 3 to 10 times smaller than AdamW's, since every step has the full length.
        return None if suggested is None else suggested / 3

    def create(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return import_bitsandbytes().optim.Lion8bit(
            parameters,
            lr=self.lr,
            betas=tuple(self.betas),
            weight_decay=self.weight_decay,
            min_8bit_size=self.min_8bit_size,
        )
