"""8-bit weights: float8_e4m3fn or int8, with a scale for each row."""

from __future__ import annotations

from functools import cache

import torch

from trainer.precision.quantized_linear import QuantizedWeight

E4M3 = torch.float8_e4m3fn
MIN_SCALE_EXPONENT = -24
"""2^-24 is the smallest positive number of float16."""


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (out, in) -> float8 numbers as bytes (out, in) uint8, and the scale of each row (out,) float32.

    The bytes are uint8 because gloo and Metal do not support float8. Scales are powers of two: the relative
    precision of e4m3 is the same over its range, so this loses nothing, and multiplying by them is exact in
    float16 and bfloat16.
    """
    ratio = weight.abs().amax(1).float() / torch.finfo(E4M3).max
    if not ratio.is_meta:
        ratio = ratio.cpu()
    exponent = torch.frexp(ratio).exponent.clamp(min=MIN_SCALE_EXPONENT)
    scale = torch.ldexp(torch.ones_like(ratio), exponent).to(weight.device)
    return (weight.float() / scale[:, None]).to(E4M3).view(torch.uint8), scale


def dequantize_fp8(
    dtype: torch.dtype, codes: torch.Tensor, scale: torch.Tensor | None = None, float8: torch.dtype = E4M3
) -> torch.Tensor:
    """Returns weights (out, in) in `dtype`.

    `codes` are `float8` numbers as bytes; `scale` is (out,), (), or None for 1.
    """
    if codes.device.type == "mps":
        # Metal has no float8.
        values = float8_values(float8).to(codes.device, dtype)[codes.int()]
    else:
        values = codes.view(float8).to(dtype)
    return values if scale is None else values.mul_(scale.to(dtype)[..., None])


def multiply_fp8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (..., in), weights as of `quantize_fp8` -> x W^T (..., out) in the dtype of x, by a product of float8 numbers.

    x is rounded to float8 with a scale for each row, too. Products are added up in float32. cuBLAS needs numbers of
    rows and columns that 16 divides; other layers are dequantized.
    """
    if codes.shape[0] % 16 or codes.shape[1] % 16:
        return torch.nn.functional.linear(x, dequantize_fp8(x.dtype, codes, scale))
    rows = x.reshape(-1, x.shape[-1]).float()
    row_scale = (rows.abs().amax(1, keepdim=True) / torch.finfo(E4M3).max).clamp(min=2.0**MIN_SCALE_EXPONENT)
    # cuBLAS returns only bfloat16 where each row has a scale.
    out_dtype = torch.float32 if x.device.type == "cpu" else torch.bfloat16
    result = torch._scaled_mm(
        (rows / row_scale).to(E4M3),
        codes.view(E4M3).t(),
        scale_a=row_scale,
        scale_b=scale[None],
        out_dtype=out_dtype,
    )
    return result.to(x.dtype).view(*x.shape[:-1], -1)


@cache
def float8_values(float8: torch.dtype) -> torch.Tensor:
    """Returns the value of each byte as a float8 number, (256,) float32."""
    return torch.arange(256).to(torch.uint8).view(float8).float()


def fp8_weight(weight: torch.Tensor, device: torch.device) -> QuantizedWeight:
    """Quantizes weights (out, in) to float8 on a device."""
    codes, scale = quantize_fp8(weight.to("cpu" if device.type == "mps" else device))
    return dequantize_fp8, {"codes": codes.to(device), "scale": scale.to(device)}


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (out, in) -> integers from -127 to 127 (out, in) int8, and the scale of each row (out,) float32.

    Scales are rounded to bfloat16, so that they are the same in 16-bit products.
    """
    scale = (weight.abs().amax(1).float() / 127).clamp(min=2.0**MIN_SCALE_EXPONENT).to(torch.bfloat16).float()
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize_int8(dtype: torch.dtype, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns weights (out, in) in `dtype`; see `quantize_int8`."""
    return codes.to(dtype).mul_(scale.to(dtype)[:, None])


def int8_weight(weight: torch.Tensor, device: torch.device) -> QuantizedWeight:
    """Quantizes weights (out, in) to int8 on a device."""
    codes, scale = quantize_int8(weight.to(device))
    return dequantize_int8, {"codes": codes, "scale": scale}
