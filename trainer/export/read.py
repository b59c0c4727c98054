"""Reads the adapters that this program, peft, diffusers, ComfyUI, kohya's scripts and LyCORIS write.

Every tensor of a file is read or named in a refusal: an adapter that is read in part is another adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core import documents, tensor_files
from trainer.core.errors import DataError, UsageError
from trainer.export.adapter_tensors import build_adapter, group_keys, split_rows
from trainer.export.peft_config import PeftConfig, parse_peft_config
from trainer.model.adapter_names import TEXT_ENCODER, layer_names

if TYPE_CHECKING:
    import torch

    from trainer.method.layer_adapter import LayerAdapter
    from trainer.model import Family
    from trainer.model.adapter_names import LayerRows

PEFT_CONFIG = "adapter_config.json"
"""File that identifies a peft folder."""
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""Start of the names of tensors in a peft folder."""
METADATA = "lora_adapter_metadata"
"""Entry of a LoRA file's metadata in which diffusers keeps peft's configuration of each component."""


@dataclass(slots=True)
class AdapterSource:
    """The contents of a file, or of a folder with several."""

    path: Path
    files: dict[Path, dict[str, str]]
    """Safetensors file -> key in it -> key to read it as."""
    configs: dict[str, PeftConfig]
    """Start of the names of layers -> configuration."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors by the keys to read them as. Raises errors.DataError."""
        return {
            keys[key]: tensor
            for path, keys in self.files.items()
            for key, tensor in tensor_files.load_tensors(path).items()
        }


def is_adapter_path(path: Path) -> bool:
    """Returns whether `path` is a file, or a folder written by peft. Otherwise, it can only name a run."""
    return path.is_file() or (path / PEFT_CONFIG).is_file() or any(path.glob(f"*/{PEFT_CONFIG}"))


def check_adapter(path: Path, family: Family) -> None:
    """Raises the errors of `read_adapter` that the names of tensors and the configuration suffice to know."""
    source = _open(path)
    _resolve((key for keys in source.files.values() for key in keys.values()), family, source.path)


def read_adapter(path: Path, family: Family, scale: float | None = None) -> dict[str, LayerAdapter]:
    """Reads a peft folder, or a folder with one for each component, or a safetensors file of adapter weights.

    Returns layer name -> the adapter of that layer. `scale` is alpha / rank of a file that does not say it: of a
    checkpoint of this program. Other programs take alpha for the rank where it is not said.

    Raises errors.UsageError if it is not an adapter that this program can train for this model, or is one only in part,
    and errors.DataError if it is damaged.
    """
    source = _open(path)
    return adapters_of(source.tensors(), family, source.path, source.configs, scale)


def adapters_of(
    tensors: Mapping[str, torch.Tensor],
    family: Family,
    path: object,
    configs: Mapping[str, PeftConfig] | None = None,
    scale: float | None = None,
) -> dict[str, LayerAdapter]:
    """Returns layer name -> the adapter of that layer; see `read_adapter`. `path` names `tensors` in messages."""
    adapters: dict[str, LayerAdapter] = {}
    for layer, (keys, parts) in _resolve(tensors, family, path).items():
        try:
            adapter, alpha = build_adapter(layer, {leaf: tensors[key] for leaf, key in keys.items()})
            adapter.scale = _scale(layer, adapter, alpha, configs or {}, scale)
            found = split_rows(layer, adapter, parts)
            if twice := adapters.keys() & found.keys():
                raise DataError(f"it holds the layer {min(twice)} twice, the second time as {layer}")
        except (DataError, UsageError) as error:
            raise type(error)(f"method.init_from={path}: {error}. Type a different method.init_from") from error
        adapters |= found
    return adapters


def _open(path: Path) -> AdapterSource:
    """Reads configurations and the headers of files."""
    if path.is_file():
        metadata, keys = tensor_files.read_header(path)
        return AdapterSource(path, {path: {key: key for key in keys}}, _configs_in_metadata(path, metadata))
    folders = (
        [path] if (path / PEFT_CONFIG).is_file() else sorted(found.parent for found in path.glob(f"*/{PEFT_CONFIG}"))
    )
    source = AdapterSource(path, {}, {})
    for folder in folders:
        weights = folder / PEFT_WEIGHTS
        if not weights.is_file():
            raise DataError(
                f"method.init_from={path}: {folder} has no {PEFT_WEIGHTS}, the only format of weights that is read; "
                "save the adapter again with peft's save_pretrained(..., safe_serialization=True)"
            )
        prefix = PEFT_PREFIX if folder == path else f"{folder.name}."
        source.configs[prefix] = parse_peft_config(documents.read_json(folder / PEFT_CONFIG), str(folder / PEFT_CONFIG))
        source.files[weights] = {
            key: prefix + key.removeprefix(PEFT_PREFIX) for key in tensor_files.read_header(weights)[1]
        }
    return source


def _configs_in_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    if METADATA not in metadata:
        return {}
    where = f"{path}: {METADATA}"
    try:
        values = documents.parse_json(metadata[METADATA])
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON: {error}. Restore the file.") from None
    components: dict[str, dict[str, object]] = {}
    for key, value in documents.expect(values, dict, where).items():
        component, _, name = key.rpartition(".")
        components.setdefault(f"{component}.", {})[name] = value
    return {prefix: parse_peft_config(config, where) for prefix, config in components.items()}


def _resolve(keys: Iterable[str], family: Family, path: object) -> dict[str, tuple[dict[str, str], list[LayerRows]]]:
    """Returns layer in the file -> its tensors (name -> key) and the layers of the network that it holds.

    Raises errors.UsageError if a tensor is not of an adapter of this model.
    """
    try:
        layers, others = group_keys(keys)
    except DataError as error:
        raise DataError(f"method.init_from={path}: {error}") from error
    names = layer_names(family)
    unknown = [key for layer, tensors in layers.items() if layer not in names for key in tensors.values()]
    if not layers or (unread := sorted([*unknown, *others])):
        raise UsageError(_describe_unread(path, family, bool(layers), unread if layers else others))
    return {layer: (tensors, names[layer]) for layer, tensors in layers.items()}


def _describe_unread(path: object, family: Family, is_adapter: bool, unread: list[str]) -> str:
    examples = ", ".join(key[:100] for key in unread[:3])
    if not is_adapter:
        return (
            f"method.init_from={path} holds no LoRA, DoRA, LoHa or LoKr ({len(unread)} tensors: {examples or 'none'}); "
            "type the path of one. A checkpoint is trained further as model.path, or with method=full"
        )
    text_encoder = [key for key in unread if TEXT_ENCODER.match(key)]
    settings = {f"model.{setting}" for setting in ("train_text_encoder",) if getattr(family, setting, None) is False}
    if text_encoder and settings:
        remedy = f"Type {settings.pop()}=true, so that the text encoder's layers are trained too"
    elif text_encoder:
        remedy = "This model's text encoders are not trained: start from a file without their layers"
    else:
        remedy = (
            "It is of another model, or of a kind that this program does not train: start from a plain LoRA of this "
            "model"
        )
    return (
        f"method.init_from={path} holds {len(unread)} tensors that this run would not train ({examples}), so it would "
        f"start from a part of the adapter. {remedy}"
    )


def _scale(
    layer: str, adapter: LayerAdapter, alpha: float | None, configs: Mapping[str, PeftConfig], default: float | None
) -> float:
    """Returns the factor of a layer's update."""
    rank = adapter.rank()
    config = next((item for item in configs.items() if layer.startswith(item[0])), None)
    configured = config[1].scale(layer.removeprefix(config[0]), rank) if config else None
    if alpha is None:
        return configured if configured is not None else 1.0 if default is None else default
    # Alpha says nothing about a LoKr without a product of low rank, in LyCORIS and in all who read its files.
    scale = 1.0 if rank is None else alpha / rank
    if configured is not None and not isclose(scale, configured, rel_tol=1e-3):
        raise DataError(f"{layer} has an alpha of {alpha:g}, but its configuration has the factor {configured:g}")
    return scale
