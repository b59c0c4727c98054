"""What an adapter does to the outputs of its layers, for comparing two adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from trainer.core.rng import normal
from trainer.method.adapter_layers import adapted_layers, low_rank_factors, magnitudes, row_norms

MAGNITUDES = ", magnitudes"
"""Suffix of the keys for DoRA's magnitudes."""


def probe_outputs(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns what the adapter adds to the output of each adapted layer, (4, out) float32, for a fixed random input.

    For DoRA this is the update before normalization, and a further key per layer holds the magnitudes, (out,). The
    frozen weights are not used, so `network` may be an empty model.
    """
    outputs = {}
    for name, layer, adapter_name in adapted_layers(network):
        if isinstance(layer, LoraLayer):
            a, b = low_rank_factors(layer, adapter_name)
            scaling: Any = layer.scaling[adapter_name]
            outputs[name] = _probe_input(name, a) @ a.T @ b.T * scaling
        else:
            update = layer.get_delta_weight(adapter_name).float().flatten(1)
            outputs[name] = _probe_input(name, update) @ update.T
        if (magnitude := magnitudes(layer, adapter_name)) is not None:
            outputs[name + MAGNITUDES] = magnitude
    return outputs


def _probe_input(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Returns an input (4, in) for a layer with weights (..., in)."""
    return normal((4, weight.shape[1]), "probe", name).to(weight.device)


def is_noop(network: torch.nn.Module) -> bool:
    """Returns whether the adapter changes nothing."""
    for name, output in probe_outputs(network).items():
        expected = output.new_zeros(())
        if name.endswith(MAGNITUDES):
            layer: Any = network.get_submodule(name.removesuffix(MAGNITUDES))
            expected = expected + row_norms(layer.get_base_layer().weight)
        if not torch.allclose(output, expected, rtol=1e-6, atol=0):
            return False
    return True
