"""What was trained, in the forms that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import Run

if TYPE_CHECKING:
    import torch


def after_training(
    run: Run, network: torch.nn.Module, parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor], folder: Path
) -> list[Path]:
    """An adapter is exported at the end of every run; whole networks are large, and left to `stage=export`."""
    from trainer.method import Lora

    return write(run, network, parameters, weights, folder) if isinstance(run.method, Lora) else []


def write(
    run: Run, network: torch.nn.Module, parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor], folder: Path
) -> list[Path]:
    """Write `weights` (of `parameters`, by name): an adapter as diffusers' `pytorch_lora_weights.safetensors` with its metadata, a whole
    network as a checkpoint folder that `model.path` and diffusers load."""
    from trainer.method import Lora, adapter, swapped

    folder.mkdir(parents=True, exist_ok=True)
    with swapped(network, {name: weights[name].to(parameter.device) for name, parameter in parameters.items()}):
        if isinstance(run.method, Lora):
            return [run.model.save_adapter(*adapter(network), folder)]
        return [run.model.save_checkpoint(network, folder)]
