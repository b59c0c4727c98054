"""Checkpoints that are quantised already, taken as they are: float8 with or without a scale, and bitsandbytes' 4-bit and 8-bit layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from trainer.core.errors import UsageError
from trainer.core.libraries import bitsandbytes
from trainer.precision import kinds_of
from trainer.precision.eight_bit import decode_fp8, decode_int8
from trainer.precision.four_bit import taken_apart
from trainer.precision.linear import Decode, Read, StoredLinear, bias_of

Taken = tuple[Decode, dict[str, torch.Tensor]]


def maker(types: dict[str, str], dtype: torch.dtype, device: torch.device) -> Callable:
    """What `trainer.model.filled` asks for each layer of a checkpoint whose tensors are of these types: a `StoredLinear` on `device` of every
    linear layer that is quantised there."""
    kinds = kinds_of(types)
    if device.type == "mps" and "4-bit" in kinds.values():
        raise UsageError(
            "precision=native: the checkpoint's weights are read by bitsandbytes, which does not run on Apple GPUs; type hardware=cpu"
        )

    def stored(name: str, layer: torch.nn.Module, read: Read) -> torch.nn.Module | None:
        if type(layer) is not torch.nn.Linear or name not in kinds:
            return None
        decode, tensors = TAKEN[kinds[name]](name, types, read, device)
        return StoredLinear(
            layer.in_features, layer.out_features, bias_of(name, layer, read, dtype, device), decode, **tensors
        )

    return stored


def _float8(name: str, types: dict[str, str], read: Read, device: torch.device) -> Taken:
    weight = read(f"{name}.weight")
    tensors = {"codes": weight.view(torch.uint8).to(device)}
    for scale in (f"{name}.weight_scale", f"{name}.scale_weight"):
        if scale in types:
            found = read(scale).float().flatten()
            # One for the layer, or one for each row.
            tensors["scale"] = (found[0] if len(found) == 1 else found).to(device)
    return FLOAT8[weight.dtype], tensors


def _int8(name: str, types: dict[str, str], read: Read, device: torch.device) -> Taken:
    return decode_int8, {
        "codes": read(f"{name}.weight").to(device),
        "scale": read(f"{name}.SCB").float().to(device) / 127,
    }


def _four_bit(name: str, types: dict[str, str], read: Read, device: torch.device) -> Taken:
    start = f"{name}.weight"
    state = {key.removeprefix(f"{start}."): read(key) for key in types if key.startswith(f"{start}.")}
    return taken_apart(read(start).to(device), bitsandbytes().functional.QuantState.from_dict(state, device))


FLOAT8 = {kind: partial(decode_fp8, kind=kind) for kind in (torch.float8_e4m3fn, torch.float8_e5m2)}
TAKEN = {"fp8": _float8, "int8": _int8, "4-bit": _four_bit}
