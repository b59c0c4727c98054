"""Helpers for tests that compare networks and exports with diffusers' pipelines."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from synthetic import normal

from trainer.config.schema import Run
from trainer.config.sections import Export, Format
from trainer.export.write import write_exports
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model import Family
from trainer.precision import Precision

# tests/test_single_file.py is about the last one.
LORA_FORMATS = [Format[name] for name in Lora.formats if name != Format.single_file.name]


def record_calls(network: Any, calls: list[dict[str, Any]]) -> None:
    """Appends the keyword arguments and the `result` of each forward pass to `calls`."""
    forward = network.forward

    def recorded(**arguments):
        output = forward(**arguments)
        calls.append({**arguments, "result": output[0]})
        return output

    network.forward = recorded


@dataclasses.dataclass
class TrainedLora:
    """A network with a LoRA that changes its images much, and the images."""

    run: Run
    network: torch.nn.Module
    images: np.ndarray

    @property
    def family(self) -> Family:
        return self.run.model

    def export(self, format: Format, folder: Path) -> Path:
        """Writes the LoRA in one format and returns the path."""
        run = dataclasses.replace(self.run, export=Export(formats=[format]))
        weights = {name: parameter.detach() for name, parameter in trainable_parameters(self.network).items()}
        (path,) = write_exports(run, self.network, weights, folder)
        return path


def train_lora(
    family: Family,
    network: torch.nn.Module,
    extra_targets: Sequence[str],
    generate: Callable[[torch.nn.Module], np.ndarray],
    std: float,
) -> TrainedLora:
    """Attaches a LoRA with random weights of this size. Its alpha is not its rank, and it has dropout in training."""
    method = Lora(rank=4, alpha=8.0, dropout=0.5, targets=[*family.target_modules, *extra_targets])
    method.attach(network, family.target_modules, seed=0)
    before = generate(network.eval())
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            parameter.copy_(std * normal(tuple(parameter.shape), name))
    after = generate(network)
    assert np.abs(after - before).max() > 0.01
    return TrainedLora(Run(model=family, method=method, precision=Precision(), export=Export()), network, after)


def load_adapter_export(pipeline: Any, format: Format, path: Path) -> None:
    """Loads an exported LoRA into a pipeline as a user would."""
    if format is Format.peft:
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, str(path)).get_base_model()
    else:
        pipeline.load_lora_weights(path.parent, weight_name=path.name)


def find_comfyui_layer(network: torch.nn.Module, prefix: str, known: str, name: str) -> torch.nn.Module:
    """Returns the layer that ComfyUI finds under `<prefix><layer>`; `known` is a pattern of the layers it knows."""
    layer = name.removeprefix(prefix)
    assert re.fullmatch(known, layer), layer
    return network.get_submodule(layer)


def merge_comfyui_lora(path: Path, find_layer: Callable[[str], Any], up: str = "lora_B", down: str = "lora_A") -> None:
    """Merges a LoRA file into layers as ComfyUI does, which reads no metadata.

    W += (alpha / rank, or 1 without an alpha) B A. `find_layer` returns the layer of a name in the file; `up` and
    `down` are the names of B and A.
    """
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith(f".{up}.weight")]:
        name = key.removesuffix(f".{up}.weight")
        b, a = tensors.pop(key), tensors.pop(f"{name}.{down}.weight")
        scale = tensors.pop(f"{name}.alpha").item() / len(a) if f"{name}.alpha" in tensors else 1
        weight = find_layer(name).weight
        weight.data += (scale * b.flatten(1) @ a.flatten(1)).view(weight.shape).to(weight.device)
    assert not tensors
