"""A byte a weight: float8_e4m3fn or int8, with a scale for each row."""

from __future__ import annotations

from functools import cache

import torch

from trainer.precision.linear import Decode

FLOAT8 = torch.float8_e4m3fn
SMALLEST_SCALE = -24
"""Exponent: the smallest number that float16 has."""


def encode_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (out, in) -> their float8 as bytes (out, in) uint8, and the scale of each row (out,) float32.

    The bytes are uint8 for those who do not know float8: gloo and Metal. The scale is a power of two: e4m3 is as fine anywhere in its range,
    so no digit is lost by it, and multiplying with it is exact in float16 and bfloat16 too.
    """
    exponent = torch.frexp(weight.abs().amax(1).float().cpu() / torch.finfo(FLOAT8).max).exponent.clamp(
        min=SMALLEST_SCALE
    )
    scale = torch.ldexp(torch.ones(len(exponent)), exponent).to(weight.device)
    return (weight.float() / scale[:, None]).to(FLOAT8).view(torch.uint8), scale


def decode_fp8(
    dtype: torch.dtype, codes: torch.Tensor, scale: torch.Tensor | None = None, kind: torch.dtype = FLOAT8
) -> torch.Tensor:
    """The weights (out, in) that lie in `codes` as float8 of this `kind`; `scale` is (out,), (), or None for 1."""
    # Metal has no float8.
    on_metal = codes.device.type == "mps"
    values = values_of_bytes(kind).to(codes.device, dtype)[codes.int()] if on_metal else codes.view(kind).to(dtype)
    return values if scale is None else values.mul_(scale.to(dtype)[..., None])


@cache
def values_of_bytes(kind: torch.dtype) -> torch.Tensor:
    """What each byte means as a float8, (256,) float32."""
    return torch.arange(256).to(torch.uint8).view(kind).float()


def fp8(weight: torch.Tensor, device: torch.device) -> tuple[Decode, dict[str, torch.Tensor]]:
    codes, scale = encode_fp8(weight.to("cpu" if device.type == "mps" else device))
    return decode_fp8, {"codes": codes.to(device), "scale": scale.to(device)}


def encode_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (out, in) -> whole numbers from -127 to 127 (out, in) int8, and the scale of each row (out,) float32.

    The scale has no more digits than bfloat16, so that a product in 16 bits sees the same one.
    """
    scale = (weight.abs().amax(1).float() / 127).clamp(min=2.0**SMALLEST_SCALE).to(torch.bfloat16).float()
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def decode_int8(dtype: torch.dtype, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weights (out, in) that `encode_int8` stored."""
    return codes.to(dtype).mul_(scale.to(dtype)[:, None])


def int8(weight: torch.Tensor, device: torch.device) -> tuple[Decode, dict[str, torch.Tensor]]:
    codes, scale = encode_int8(weight.to(device))
    return decode_int8, {"codes": codes, "scale": scale}
