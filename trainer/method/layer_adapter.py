"""The adapter of one layer. Importing this imports neither torch nor peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

METHOD_OF_PREFIX = {"lora_magnitude_vector": "dora", "lora_": "lora", "hada_": "loha", "lokr_": "lokr"}
"""Prefix of the names of an adapter's tensors -> method. The first match counts."""
SCALABLE = ("lora_B.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")
"""Tensors of which each method has one: multiplying it by a factor multiplies the whole update."""


@dataclass(slots=True)
class LayerAdapter:
    """Adapter of one layer."""

    tensors: dict[str, torch.Tensor]
    """Tensors by peft's names, such as `lora_A.weight`."""
    scale: float
    """alpha / rank, the factor of the update."""

    def method(self) -> str:
        """Returns the name of the method that trained this adapter."""
        return next(
            method
            for prefix, method in METHOD_OF_PREFIX.items()
            if any(name.startswith(prefix) for name in self.tensors)
        )

    def rank(self) -> int | None:
        """Returns the rank; None if no factor is a product of low rank."""
        ranks = [tensor.shape[0] for name, tensor in self.tensors.items() if name.endswith(("lora_A.weight", "_b"))]
        return ranks[0] if ranks else None

    def rescaled(self, scale: float) -> dict[str, torch.Tensor]:
        """Returns the tensors that give the same update with a different `scale`."""
        factor = self.scale / scale
        return {name: tensor * factor if name in SCALABLE else tensor for name, tensor in self.tensors.items()}
