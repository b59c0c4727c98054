"""Half a byte a weight: bitsandbytes' nf4 (Dettmers et al. 2023) and fp4, 16 values and a scale for each block of 64 weights.

bitsandbytes' own layers are not used: on some CPUs they pack the weights anew when nothing trains, and cannot train on afterwards.
"""

from __future__ import annotations

from functools import cache, partial

import torch

from trainer.core.libraries import bitsandbytes
from trainer.precision.linear import Decode

BLOCK = 64
"""Weights that share a scale."""


def four_bit(weight: torch.Tensor, device: torch.device, kind: str) -> tuple[Decode, dict[str, torch.Tensor]]:
    """nf4 or fp4, whose scales are bytes too (QLoRA's double quantisation): 4.13 bits a weight."""
    codes, state = bitsandbytes().functional.quantize_4bit(
        weight.to(device).contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type=kind
    )
    return taken_apart(codes, state)


def taken_apart(codes: torch.Tensor, state) -> tuple[Decode, dict[str, torch.Tensor]]:
    """bitsandbytes' QuantState as `StoredLinear` keeps it."""
    tensors = {"codes": codes, "scale": state.absmax, "values": state.code}
    if state.nested:
        tensors |= {
            "offset": state.offset,
            "scale_of_scales": state.state2.absmax,
            "values_of_scales": state.state2.code,
        }
    blocks = state.blocksize, state.state2.blocksize if state.nested else 0
    return decoder(state.quant_type, tuple(state.shape), *blocks), tensors


@cache
def decoder(kind: str, shape: tuple[int, int], block: int, block_of_scales: int) -> Decode:
    """One object for all layers that are alike: torch.compile compiles each anew."""
    return partial(decode_4bit, kind=kind, shape=shape, block=block, block_of_scales=block_of_scales)


def decode_4bit(
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
    block: int,
    block_of_scales: int = 0,
) -> torch.Tensor:
    """The weights (out, in) that lie in `codes`, two a byte. The scales may be bytes in their turn, which is what the last tensors are for."""
    functional = bitsandbytes().functional
    if offset is not None:
        state = functional.QuantState(
            scale_of_scales, code=values_of_scales, blocksize=block_of_scales, dtype=torch.float32
        )
        scale = functional.dequantize_blockwise(scale, state) + offset
    state = functional.QuantState(scale, torch.Size(shape), values, block, kind, dtype)
    return functional.dequantize_4bit(codes, state)
