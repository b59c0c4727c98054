"""Floating-point types that settings can name."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import dtype


class Dtype(Enum):
    """A floating-point type by torch's name, which can be used in settings without importing torch.

    The short names are aliases.
    """

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    fp32 = float32
    bf16 = bfloat16
    fp16 = float16

    @property
    def torch(self) -> dtype:
        """Returns the `torch.dtype` of this name."""
        import torch

        return getattr(torch, self.value)
