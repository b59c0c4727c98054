"""4-bit weights of bitsandbytes: nf4 (Dettmers et al. 2023) and fp4, with a scale for each block of 64 weights.

The layers of bitsandbytes are not used: on some CPUs, their forward pass in evaluation repacks the weights, and
the layer cannot train afterwards.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from trainer.core.libraries import import_bitsandbytes
from trainer.precision.quantized_linear import Dequantize, QuantizedWeight

BLOCK_SIZE = 64
"""Number of weights that share a scale."""


def nf4_weight(weight: torch.Tensor, device: torch.device) -> QuantizedWeight:
    """Quantizes weights (out, in) to nf4 on a device."""
    return _quantize(weight, device, "nf4")


def fp4_weight(weight: torch.Tensor, device: torch.device) -> QuantizedWeight:
    """Quantizes weights (out, in) to fp4 on a device."""
    return _quantize(weight, device, "fp4")


def _quantize(weight: torch.Tensor, device: torch.device, kind: str) -> QuantizedWeight:
    # The scales are quantized too (double quantization, QLoRA): 4.13 bits per weight.
    codes, quant_state = import_bitsandbytes().functional.quantize_4bit(
        weight.to(device).contiguous(), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type=kind
    )
    return from_quant_state(codes, quant_state)


def from_quant_state(codes: torch.Tensor, quant_state: Any) -> QuantizedWeight:
    """Converts a quantized weight of bitsandbytes, whose scales are in a `QuantState`."""
    tensors = {"codes": codes, "scale": quant_state.absmax, "values": quant_state.code}
    scale_block_size = 0
    if quant_state.nested:
        tensors |= {
            "offset": quant_state.offset,
            "scale_of_scales": quant_state.state2.absmax,
            "values_of_scales": quant_state.state2.code,
        }
        scale_block_size = quant_state.state2.blocksize
    dequantize = _dequantizer(quant_state.quant_type, tuple(quant_state.shape), quant_state.blocksize, scale_block_size)
    return dequantize, tensors


@cache
def _dequantizer(kind: str, shape: tuple[int, int], block_size: int, scale_block_size: int) -> Dequantize:
    # One object for all layers of a kind and shape: torch.compile compiles each object anew.
    return partial(dequantize_4bit, kind=kind, shape=shape, block_size=block_size, scale_block_size=scale_block_size)


def dequantize_4bit(
    dtype: torch.dtype,
    codes: torch.Tensor,
    scale: torch.Tensor,
    values: torch.Tensor,
    offset: torch.Tensor | None = None,
    scale_of_scales: torch.Tensor | None = None,
    values_of_scales: torch.Tensor | None = None,
    *,
    kind: str,
    shape: tuple[int, int],
    block_size: int,
    scale_block_size: int = 0,
) -> torch.Tensor:
    """Returns weights of `shape` (out, in) in `dtype`; `codes` hold two weights per byte.

    `values` are the 16 values of a code. The last three tensors are given if the scales are quantized too.
    """
    functional = import_bitsandbytes().functional
    if offset is not None:
        state = functional.QuantState(
            scale_of_scales, code=values_of_scales, blocksize=scale_block_size, dtype=torch.float32
        )
        scale = functional.dequantize_blockwise(scale, state) + offset
    state = functional.QuantState(scale, torch.Size(shape), values, block_size, kind, dtype)
    return functional.dequantize_4bit(codes, state)
