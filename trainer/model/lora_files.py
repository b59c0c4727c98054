"""LoRA files written and read by a diffusers pipeline class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core.tensor_files import writing_safetensors

if TYPE_CHECKING:
    import torch


def save_lora(
    pipeline: Any, weights: Mapping[str, Mapping[str, torch.Tensor]], config: dict[str, Any], path: Path
) -> None:
    """Writes LoRA weights as the file that the pipeline's `load_lora_weights` reads. Raises OSError.

    Args:
        pipeline: the diffusers pipeline class.
        weights: component -> name in the component -> tensor, with peft's names.
        config: peft's configuration of the LoRA.
        path: the safetensors file to write.
    """
    # Without metadata, a loader assumes that alpha equals the rank. Dropout in it would apply to sampling, too.
    metadata = config | {"lora_dropout": 0.0, "inference_mode": True}
    arguments: dict[str, Any] = {}
    for component, tensors in weights.items():
        if component.startswith("text_encoder"):
            # transformers, which loads this component, expects the names that the tensors have in the network.
            tensors = {re.sub(r"lora_magnitude_vector$", r"\g<0>.weight", name): tensors[name] for name in tensors}
        arguments |= {f"{component}_lora_layers": tensors, f"{component}_lora_adapter_metadata": metadata}
    with writing_safetensors(path):
        pipeline.save_lora_weights(path.parent, weight_name=path.name, **arguments)


def load_lora(pipeline: Any, models: Mapping[str, Any], path: Path) -> None:
    """Loads a LoRA file into the models, by component, with the pipeline class's own loader.

    Raises ValueError if the pipeline's `load_lora_weights` would refuse the file.
    """
    # Pipelines ignore options that they do not know.
    options = {"return_alphas": True} | ({"unet_config": models["unet"].config} if "unet" in models else {})
    # Some pipelines return no alphas.
    weights, *alphas, metadata = pipeline.lora_state_dict(
        path.parent,
        weight_name=path.name,
        return_lora_metadata=True,
        local_files_only=True,
        use_safetensors=True,
        **options,
    )
    if wrong := [name for name in weights if "lora" not in name]:
        raise ValueError(f"{path} has tensors that load_lora_weights refuses: {', '.join(wrong[:3])}")
    arguments: dict[str, Any] = {"metadata": metadata, "low_cpu_mem_usage": True}
    if alphas:
        arguments["network_alphas"] = alphas[0]
    for component, model in models.items():
        if component.startswith("text_encoder"):
            pipeline.load_lora_into_text_encoder(weights, text_encoder=model, prefix=component, **arguments)
        else:
            load = getattr(pipeline, f"load_lora_into_{component}")
            load(weights, **{component: model}, **arguments)
