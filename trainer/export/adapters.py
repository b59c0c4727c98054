"""Export formats of adapters.

Files are read back, with the loaders of diffusers and peft where they have one, into a network without weights, so that
the check needs no memory for a second model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.core import files, tensor_files
from trainer.core.dtypes import Dtype
from trainer.export import verify
from trainer.export.format import ExportFormat
from trainer.export.read import read_adapter
from trainer.method.adapter import Adapter
from trainer.method.adapter_formats import load_peft, save_peft, to_comfyui, to_peft
from trainer.method.adapter_layers import layer_adapters
from trainer.method.adapter_loading import load_into
from trainer.method.adapter_probe import probe_outputs
from trainer.model.weights import empty_model

if TYPE_CHECKING:
    from trainer.config.schema import Run


class AdapterFormat(ExportFormat):
    """A format that holds the adapter without the model."""

    is_folder = False
    """Whether the export is a folder."""

    def write(self, run: Run, network: torch.nn.Module, path: Path) -> None:
        dtype = (run.export.dtype or Dtype.float32).torch
        replace = files.replace_folder if self.is_folder else files.replace_file
        with replace(path) as unfinished:
            self.save(run, network, dtype, unfinished)
            found = probe_outputs(self.load(run, unfinished))
            verify.compare_adapters(probe_outputs(network), found, dtype, path)

    def save(self, run: Run, network: torch.nn.Module, dtype: torch.dtype, path: Path) -> None:
        """Saves the adapter that is attached to `network`. Raises OSError."""
        raise NotImplementedError

    def load(self, run: Run, path: Path) -> torch.nn.Module:
        """Returns the network without weights and with the saved adapter."""
        raise NotImplementedError


class DiffusersFormat(AdapterFormat):
    """A file for `load_lora_weights` of a diffusers pipeline."""

    def save(self, run: Run, network: torch.nn.Module, dtype: torch.dtype, path: Path) -> None:
        weights, configuration = to_peft(network)
        run.model.save_lora(_cast(weights, dtype), configuration, path)

    def load(self, run: Run, path: Path) -> torch.nn.Module:
        return run.model.load_lora(path)


class PeftFormat(AdapterFormat):
    """A folder for `PeftModel.from_pretrained`. If the network has several components, it has a folder for each."""

    is_folder = True

    def save(self, run: Run, network: torch.nn.Module, dtype: torch.dtype, path: Path) -> None:
        weights, configuration = to_peft(network)
        for prefix in _component_prefixes(run):
            own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
            if prefix:
                layers = {name.rpartition(".lora_")[0] or name.rpartition(".")[0] for name in own}
                configuration = configuration | {"target_modules": sorted(layers)}
            if own:
                save_peft(_cast(own, dtype), configuration, path / prefix.rstrip("."))

    def load(self, run: Run, path: Path) -> torch.nn.Module:
        network = empty_model(run.model.meta_model())
        for prefix in _component_prefixes(run):
            folder = path / prefix.rstrip(".")
            if folder.is_dir():
                load_peft(network.get_submodule(prefix.rstrip(".")), folder)
        return network


def _component_prefixes(run: Run) -> list[str]:
    """Returns what the names of each component start with in the network."""
    prefixes = (run.model.network_name(component, "") for component in run.model.components)
    return [prefix for prefix in prefixes if prefix is not None]


class ComfyUIFormat(AdapterFormat):
    """A file for ComfyUI, which reads no metadata: where each layer has a tensor with its alpha, it is in float32."""

    def save(self, run: Run, network: torch.nn.Module, dtype: torch.dtype, path: Path) -> None:
        tensors = to_comfyui(layer_adapters(network), run.model.comfyui_key, run.model.alpha_tensors)
        alphas = {name: tensor for name, tensor in tensors.items() if name.endswith(".alpha")}
        tensor_files.save_tensors(path, _cast(tensors, dtype) | alphas, {"format": "pt"})

    def load(self, run: Run, path: Path) -> torch.nn.Module:
        network = empty_model(run.model.meta_model())
        run.method.attach(network, run.model.target_modules, run.seed)
        assert isinstance(run.method, Adapter)
        load_into(read_adapter(path, run.model), network, run.method, path)
        return network


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}
