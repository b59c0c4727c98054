"""Conversions of adapters to the formats of peft and ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from trainer.core import files, tensor_files
from trainer.method.layer_adapter import LayerAdapter


def to_peft(network: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the weights of the attached adapter by peft's names, and its configuration."""
    configs: Any = network.peft_config
    config = configs["default"].to_dict()
    # The order of a set differs between processes, and so would the bytes of the file.
    config["target_modules"] = sorted(config["target_modules"])
    return get_peft_model_state_dict(network), config


def save_peft(weights: dict[str, torch.Tensor], config: dict[str, Any], folder: Path) -> None:
    """Saves an adapter for `peft.PeftModel.from_pretrained(network, folder)`. Raises OSError."""
    files.write_json(folder / "adapter_config.json", config | {"inference_mode": True})
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    tensor_files.save_tensors(folder / "adapter_model.safetensors", prefixed, {"format": "pt"})


def load_peft(network: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Attaches the adapter in a folder to `network`, with peft's own loader, and returns the network."""
    return PeftModel.from_pretrained(network, str(folder), torch_device="cpu", low_cpu_mem_usage=True).get_base_model()


def to_comfyui(
    adapters: dict[str, LayerAdapter], comfyui_key: Callable[[str], str], with_alpha: bool
) -> dict[str, torch.Tensor]:
    """Returns an adapter by ComfyUI's names. ComfyUI reads no metadata, but a tensor with the alpha of each layer.

    Without such a tensor, readers take alpha for the rank, and the update is scaled accordingly. `comfyui_key` converts
    `<layer>.<tensor>`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, adapter in adapters.items():
        # Readers ignore the alpha of LoKr layers without a low-rank factor.
        if adapter.method() == "lokr" or not with_alpha:
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in adapter.rescaled(1.0).items()}
        else:
            rank = adapter.rank()
            assert rank is not None
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in adapter.tensors.items()}
            tensors[f"{name}.alpha"] = torch.tensor(adapter.scale * rank)
    return {comfyui_key(key): tensor for key, tensor in tensors.items()}
