"""The adapted layers of a network: their adapters, and their weights before and after training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from trainer.method.layer_adapter import LayerAdapter


def adapted_layers(network: torch.nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Yields (name, layer, name of its adapter) for each adapted layer, a `BaseTunerLayer` of peft."""
    for name, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer):
            (adapter_name,) = layer.active_adapters
            yield name, layer, adapter_name


def layer_adapters(network: torch.nn.Module) -> dict[str, LayerAdapter]:
    """Returns the adapter of each adapted layer, by the name of the layer."""
    return {
        name: LayerAdapter(
            {
                leaf.replace(f".{adapter_name}", "", 1): tensor
                for leaf, tensor in layer.named_parameters()
                if not leaf.startswith("base_layer.")
            },
            float(layer.scaling[adapter_name]),
        )
        for name, layer, adapter_name in adapted_layers(network)
    }


def low_rank_factors(layer: Any, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A (rank, in) and B (out, rank) of a LoRA layer, float32.

    For a convolution the kernel is flattened into `in`; the kernel of B is 1 x 1.
    """
    lora_a, lora_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    return lora_a.weight.float().flatten(1), lora_b.weight.float().flatten(1)


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """Returns |W| of each row (for a convolution: of each kernel), (out,) float32."""
    return torch.linalg.norm(weight.float().flatten(1), dim=1)


def magnitudes(layer: Any, adapter_name: str) -> torch.Tensor | None:
    """Returns DoRA's magnitudes, (out,) float32; None for other methods."""
    vectors = getattr(layer, "lora_magnitude_vector", {})
    return vectors[adapter_name].weight.float().flatten() if adapter_name in vectors else None


def init_magnitudes(network: torch.nn.Module) -> None:
    """Initializes DoRA's magnitudes with the row norms of the frozen weights, in float32.

    peft computes them in the type of the weights: in bfloat16, the adapter would change the network from the start.
    """
    for _, layer, adapter_name in adapted_layers(network):
        magnitude = layer.lora_magnitude_vector[adapter_name].weight
        magnitude.data = row_norms(layer.get_base_layer().weight).reshape(magnitude.shape)


def frozen_tensor(network: torch.nn.Module, name: str) -> torch.Tensor:
    """Returns the tensor `name` without the adapter; dequantized if the layer is quantized."""
    path, _, leaf = name.rpartition(".")
    layer = network.get_submodule(path)
    return getattr(getattr(layer, "base_layer", layer), leaf)


def merged_tensor(network: torch.nn.Module, name: str) -> torch.Tensor:
    """Returns the tensor `name` with the adapter merged into it, in float32 if its layer is adapted."""
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    tensor = frozen_tensor(network, name)
    if leaf != "weight" or not isinstance(module, BaseTunerLayer):
        return tensor
    layer: Any = module
    (adapter_name,) = layer.active_adapters
    if isinstance(layer, LoraLayer):
        # Unlike peft's get_delta_weight, this does not round to the type of the adapter.
        a, b = low_rank_factors(layer, adapter_name)
        update = (b @ a).reshape(tensor.shape) * layer.scaling[adapter_name]
    else:
        update = layer.get_delta_weight(adapter_name).float()
    tensor = tensor.float() + update
    if (magnitude := magnitudes(layer, adapter_name)) is None:
        return tensor
    return tensor * (magnitude / row_norms(tensor)).reshape(-1, *(1 for _ in tensor.shape[1:]))
