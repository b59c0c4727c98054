"""AdamW of bitsandbytes, with 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.core.libraries import import_bitsandbytes
from trainer.optimizer.adam import Adam

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class AdamW8bit(Adam):
    """AdamW with 8-bit moments (Dettmers et al. 2022)."""

    min_8bit_size: int = 4096
    """Tensors with fewer entries keep float32 moments."""

    needs_bitsandbytes = True
    class_name = "AdamW8bit"
    """Name of the class in `bitsandbytes.optim`."""

    def create(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return getattr(import_bitsandbytes().optim, self.class_name)(
            parameters,
            lr=self.lr,
            betas=tuple(self.betas),
            eps=self.eps,
            weight_decay=self.weight_decay,
            min_8bit_size=self.min_8bit_size,
        )
