"""Reads the adapters that this program, peft, diffusers, ComfyUI and kohya's scripts write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core import tensor_files
from trainer.core.errors import UsageError

if TYPE_CHECKING:
    import torch

    from trainer.method.adapter_layers import LayerAdapter
    from trainer.model import Family

PEFT_CONFIG = "adapter_config.json"
"""File that identifies a peft folder."""


def is_adapter_path(path: Path) -> bool:
    """Returns whether `path` is a file, or a folder written by peft. Otherwise, it can only name a run."""
    return path.is_file() or (path / PEFT_CONFIG).is_file()


def read_adapter(path: Path, family: Family, scale: float = 1.0) -> dict[str, LayerAdapter]:
    """Reads a peft folder or a safetensors file of adapter weights; returns layer name -> the adapter of that layer.

    `scale` is alpha / rank for a file with this program's own tensor names, which does not contain it.

    Raises errors.UsageError if it holds no adapter of this model.
    """
    from trainer.method.adapter_formats import from_checkpoint, from_comfyui, load_peft
    from trainer.method.adapter_layers import layer_adapters
    from trainer.model.weights import empty_model

    if path.is_dir():
        return layer_adapters(load_peft(empty_model(family.meta_model()), path))
    tensors = tensor_files.load_tensors(path)
    if own := from_checkpoint(tensors, scale):
        return own
    layers = {name for name, _ in family.meta_model().named_modules()}
    found = from_comfyui(tensors, sorted(layers), family.comfyui_key)
    if _is_lycoris(tensors):
        return found
    if found.keys() <= layers and sum(name.endswith(".alpha") for name in tensors) == len(found):
        return found
    # diffusers also reads LoRA files that keep alpha in the metadata or that use the names of fused layers.
    try:
        return layer_adapters(family.load_lora(path))
    except (ValueError, LookupError, RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{path} holds no LoRA that diffusers can read for this model ({reason[0]}); "
            "type a different method.init_from"
        ) from error


def _is_lycoris(tensors: dict[str, torch.Tensor]) -> bool:
    """Returns whether all tensors belong to a LoHa or LoKr."""
    return all(".lokr_" in name or ".hada_" in name or name.endswith(".alpha") for name in tensors)
