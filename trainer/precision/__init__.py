"""How the frozen weights are stored, and in which type a step computes. What trains is kept in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Storage(Enum):
    """Type of the frozen weights."""

    fp32 = "float32"
    bf16 = "bfloat16"


class Compute(Enum):
    """Type of matrix products in a step: torch's own names."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(slots=True)
class Precision:
    storage: Storage = Storage.fp32
    compute: Compute = Compute.float32

    def dtype(self) -> torch.dtype:
        """The type in which weights are loaded."""
        import torch

        return getattr(torch, self.storage.value)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The context in which a network's forward pass runs."""
        import torch

        if self.compute is Compute.float32:
            return nullcontext()
        return torch.autocast(device.type, getattr(torch, self.compute.value))


OPTIONS = {"fp32": Precision, "bf16": Precision}
