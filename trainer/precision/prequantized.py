"""Checkpoints that are quantized already: float8 with or without a scale, and layers of bitsandbytes."""

from __future__ import annotations

from functools import partial

import torch

from trainer.core.errors import UsageError
from trainer.core.libraries import import_bitsandbytes
from trainer.precision.checkpoint_types import quantized_layers
from trainer.precision.eight_bit import dequantize_fp8, dequantize_int8
from trainer.precision.four_bit import from_quant_state
from trainer.precision.quantized_linear import QuantizedWeight, QuantizeLayer, ReadTensor, quantized_layer


def checkpoint_quantizer(tensor_dtypes: dict[str, str], dtype: torch.dtype, device: torch.device) -> QuantizeLayer:
    """Returns a function that replaces each linear layer that is quantized in the checkpoint, without quantizing again.

    `tensor_dtypes` are the types of the checkpoint's tensors. Biases get `dtype`.
    """
    kinds = quantized_layers(tensor_dtypes)
    if device.type == "mps" and "4-bit" in kinds.values():
        raise UsageError(
            "precision=native: this checkpoint needs bitsandbytes, which does not run on Apple GPUs; type hardware=cpu"
        )

    def quantize(name: str, layer: torch.nn.Module, read: ReadTensor) -> torch.nn.Module | None:
        if type(layer) is not torch.nn.Linear or name not in kinds:
            return None
        weight = READ_WEIGHT[kinds[name]](name, tensor_dtypes, read, device)
        return quantized_layer(name, layer, weight, read, dtype, device)

    return quantize


def _read_fp8(name: str, tensor_dtypes: dict[str, str], read: ReadTensor, device: torch.device) -> QuantizedWeight:
    weight = read(f"{name}.weight")
    tensors = {"codes": weight.view(torch.uint8).to(device)}
    for scale_name in (f"{name}.weight_scale", f"{name}.scale_weight"):
        if scale_name in tensor_dtypes:
            # One scale for the layer, or one for each row.
            scale = read(scale_name).float().flatten()
            tensors["scale"] = (scale[0] if len(scale) == 1 else scale).to(device)
    return DEQUANTIZE_FP8[weight.dtype], tensors


def _read_int8(name: str, tensor_dtypes: dict[str, str], read: ReadTensor, device: torch.device) -> QuantizedWeight:
    codes, scale = read(f"{name}.weight").to(device), read(f"{name}.SCB").float().to(device) / 127
    return dequantize_int8, {"codes": codes, "scale": scale}


def _read_4bit(name: str, tensor_dtypes: dict[str, str], read: ReadTensor, device: torch.device) -> QuantizedWeight:
    prefix = f"{name}.weight."
    state = {key.removeprefix(prefix): read(key) for key in tensor_dtypes if key.startswith(prefix)}
    quant_state = import_bitsandbytes().functional.QuantState.from_dict(state, device)
    return from_quant_state(read(f"{name}.weight").to(device), quant_state)


# One function object for each type: torch.compile compiles each object anew.
DEQUANTIZE_FP8 = {dtype: partial(dequantize_fp8, float8=dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
READ_WEIGHT = {"fp8": _read_fp8, "int8": _read_int8, "4-bit": _read_4bit}
