"""Conversions between adapters and the formats of peft, ComfyUI, kohya's scripts, LyCORIS and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from trainer.core import files, tensor_files
from trainer.method.adapter_layers import LayerAdapter

PEFT_NAMES = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector.weight",
}
"""Name of a tensor in kohya's scripts -> its name in peft."""


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


def to_comfyui(adapters: dict[str, LayerAdapter], comfyui_key: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Returns an adapter by ComfyUI's names. ComfyUI reads no metadata: each layer has a tensor with its alpha.

    `comfyui_key` converts `<layer>.<tensor>`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, adapter in adapters.items():
        if adapter.method() == "lokr":
            # Readers ignore the alpha of LoKr layers without a low-rank factor.
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in adapter.rescaled(1.0).items()}
        else:
            rank = adapter.rank()
            assert rank is not None
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in adapter.tensors.items()}
            tensors[f"{name}.alpha"] = torch.tensor(adapter.scale * rank)
    return {comfyui_key(key): tensor for key, tensor in tensors.items()}


def from_comfyui(
    tensors: dict[str, torch.Tensor], layers: list[str], comfyui_key: Callable[[str], str]
) -> dict[str, LayerAdapter]:
    """Returns the adapters in a file with the names of ComfyUI, kohya's scripts or LyCORIS, by the name of the layer.

    `layers` are the layers of the network. An adapter of any other layer keeps the name that it has in the file.
    """
    layer_of: dict[str, str] = {}
    for layer in layers:
        flat = layer.replace(".", "_")
        names = {
            f"{prefix}{layer}" for prefix in ("", "transformer.", "unet.", "diffusion_model.", "base_model.model.")
        }
        names |= {f"lora_unet_{flat}", f"lycoris_{flat}", comfyui_key(f"{layer}.alpha").removesuffix(".alpha")}
        layer_of |= dict.fromkeys(names, layer)
    tensors_of: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.*?)\.(\w+\.weight|\w+)", key)
        name, leaf = match.groups() if match else (key, "")
        layer_tensors = tensors_of.setdefault(layer_of.get(name, name), {})
        layer_tensors[PEFT_NAMES.get(leaf, leaf)] = tensor.flatten() if leaf == "dora_scale" else tensor
    adapters = {}
    for layer, layer_tensors in tensors_of.items():
        alpha = layer_tensors.pop("alpha", None)
        adapter = adapters[layer] = LayerAdapter(layer_tensors, 1.0)
        rank = adapter.rank()
        if alpha is not None and rank is not None:
            adapter.scale = float(alpha) / rank
    return adapters


def from_checkpoint(weights: dict[str, torch.Tensor], scale: float) -> dict[str, LayerAdapter]:
    """Returns the adapters in a checkpoint of a run, by the name of the layer. Weights with other names are ignored.

    A checkpoint stores trainable parameters by their names in the network, and does not store `scale`, alpha / rank.
    """
    adapters: dict[str, LayerAdapter] = {}
    for key, tensor in weights.items():
        if match := re.fullmatch(r"(.+)\.((?:lora|hada|lokr)_\w+)\.default(\.weight)?", key):
            layer, leaf, suffix = match.groups(default="")
            adapters.setdefault(layer, LayerAdapter({}, scale)).tensors[leaf + suffix] = tensor
    return adapters
