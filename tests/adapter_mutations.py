"""Damaged adapter files: trials that read them, for `fuzz.find_failures`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import fuzz
import torch
from synthetic import normal

from trainer.core import tensor_files
from trainer.export.read import METADATA, check_adapter, read_adapter
from trainer.method.adapter import Adapter
from trainer.method.adapter_loading import load_into
from trainer.method.lokr import Lokr
from trainer.method.lora import Lora
from trainer.model import Family

KINDS = ("bytes", "header", "lora tensors", "lokr tensors", "adapter_config.json", "metadata")
LAYERS = ("transformer_blocks.0.attn.to_q", "single_blocks.0.linear1", "transformer_blocks.0.attn.to_k")
DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool)
SHAPES = ((), (0,), (1,), (1, 32), (32, 1), (0, 32), (2, 0), (2, 32, 1, 1), (32, 2), (3, 5), (1, 1, 1))
NAMES = (
    "alpha",
    "dora_scale",
    "lora_A.weight",
    "lora_B.default.weight",
    "lora_magnitude_vector",
    "hada_w1_a",
    "lokr_w2_a",
)
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {"to_k": 2},
    "alpha_pattern": {"to_q": 2.0},
    "use_rslora": False,
    "init_lora_weights": True,
    "target_modules": ["to_q", "to_k"],
    "bias": "none",
    "modules_to_save": None,
}


def trial(kind: str, family: Family, folder: Path) -> fuzz.Trial:
    """Returns a trial that damages an adapter file, reads it, and starts a run from it."""
    method: Adapter = Lokr(rank=64, alpha=64.0) if kind == "lokr tensors" else Lora(rank=2, alpha=2.0)
    method = method.resolve(("to_q", "to_k"))
    network = family.load_network(torch.float32)
    method.attach(network, family.target_modules, seed=0)

    def run(number: int) -> None:
        path = _write(kind, folder, number)
        check_adapter(path, family)
        load_into(read_adapter(path, family), network, method, path)

    return run


def _tensors(kind: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in LAYERS[:: 2 if kind in ("adapter_config.json", "metadata") else 1]:
        name = f"transformer.{layer}"
        if kind == "lokr tensors":
            tensors[f"{name}.lokr_w1"], tensors[f"{name}.lokr_w2"] = torch.ones(4, 4), torch.ones(8, 8)
        else:
            out = 224 if "linear1" in layer else 32
            tensors[f"{name}.lora_A.weight"] = normal((2, 32), layer, "a").cpu()
            tensors[f"{name}.lora_B.weight"] = normal((out, 2), layer, "b").cpu()
        if kind not in ("adapter_config.json", "metadata"):
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def _write(kind: str, folder: Path, number: int) -> Path:
    """Writes the mutation of this number; returns what `method.init_from` would be."""
    path, tensors = folder / "adapter.safetensors", _tensors(kind)
    if kind == "adapter_config.json":
        tensor_files.save_tensors(folder / "adapter_model.safetensors", tensors)
        (folder / "adapter_config.json").write_bytes(fuzz.mutate_json(CONFIG, number))
        return folder
    if kind == "metadata":
        text = fuzz.mutate_json({f"transformer.{key}": value for key, value in CONFIG.items()}, number)
        tensor_files.save_tensors(path, tensors, {METADATA: text.decode("utf-8", "replace"), "format": "pt"})
        return path
    if kind.endswith("tensors"):
        tensors = _damage(tensors, random.Random(number))
    tensor_files.save_tensors(path, tensors)
    data = path.read_bytes()
    if kind == "bytes":
        path.write_bytes(fuzz.mutate(data, number))
    elif kind == "header":
        length = int.from_bytes(data[:8], "little")
        header = fuzz.mutate_json(json.loads(data[8 : 8 + length]), number)
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    return path


def _damage(tensors: dict[str, torch.Tensor], random_state: random.Random) -> dict[str, torch.Tensor]:
    """Returns the tensors with one to three changes: other names, shapes, types, values; missing or more tensors."""
    for _ in range(random_state.randint(1, 3)):
        if not tensors:
            break
        key = random_state.choice(sorted(tensors))
        change = random_state.randrange(7)
        if change == 0:
            del tensors[key]
        elif change == 1:
            tensors[key] = torch.ones(random_state.choice(SHAPES))
        elif change == 2:
            tensors[key] = tensors[key].to(random_state.choice(DTYPES))
        elif change == 3:
            tensors[key] = torch.full_like(
                tensors[key].float(), random_state.choice((float("nan"), float("inf"), 0.0, -1.0, 1e38))
            )
        elif change == 4:
            layer = key.split(".lo")[0].removesuffix(".alpha")
            tensors[f"{layer}.{random_state.choice(NAMES)}"] = torch.ones(random_state.choice(SHAPES))
        elif change == 5:
            tensors[random_state.choice(("", ".alpha", "lora_te1_x.alpha", key.removeprefix("transformer.")))] = (
                tensors[key]
            )
        else:
            cut = random_state.randrange(len(key))
            tensors[key[:cut] + random_state.choice("._x\u00e9") + key[cut + 1 :]] = tensors.pop(key)
    return tensors
