"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from trainer.method import Method
from trainer.method.trainable import cast_trainable_to_float32

if TYPE_CHECKING:
    import torch


class MasterWeights(Enum):
    """Where updates accumulate if weights are bfloat16."""

    fp32 = "fp32"
    """In float32: the weights themselves are float32 while they train."""
    none = "none"
    """In the bfloat16 weights, with stochastic rounding."""


@dataclass(slots=True)
class Full(Method):
    """Trains every weight of the network."""

    master_weights: MasterWeights = MasterWeights.fp32

    @property
    def stochastic_rounding(self) -> bool:
        return self.master_weights is MasterWeights.none

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        network.requires_grad_(True)
        if self.master_weights is MasterWeights.fp32:
            cast_trainable_to_float32(network)

    def dtype(self, precision: torch.dtype) -> torch.dtype:
        import torch

        # Weights that train in float32 are loaded as float32, so that they are not rounded first.
        return torch.float32 if self.master_weights is MasterWeights.fp32 else precision
