"""Linear layers whose frozen weights take a byte each: float8_e4m3fn with a scale for each row.

The backward pass casts the bytes again. Where a library casts before an ordinary product (diffusers' layerwise casting, torchao), autograd
keeps every 16-bit copy until then, and the peak of a step is above that of 16-bit storage.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_SCALE = -24
"""Exponent: the smallest number that float16 has."""


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (out, in) -> their float8 as bytes (out, in) uint8, and the scale of each row (out,) float32.

    The scale is a power of two: e4m3 is as fine anywhere in its range, so no digit is lost by it, and multiplying with it is exact in float16
    and bfloat16 too.
    """
    exponent = torch.frexp(weight.abs().amax(1).float().cpu() / LARGEST).exponent.clamp(min=SMALLEST_SCALE)
    scale = torch.ldexp(torch.ones(len(exponent)), exponent).to(weight.device)
    return (weight.float() / scale[:, None]).to(torch.float8_e4m3fn).view(torch.uint8), scale


def decode(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights (out, in) that `encode` stored."""
    if weight.device.type == "mps":
        # Metal has no float8.
        values = values_of_bytes().to(weight.device, dtype)[weight.int()]
    else:
        values = weight.view(torch.float8_e4m3fn).to(dtype)
    return values.mul_(scale.to(dtype)[:, None])


@cache
def values_of_bytes() -> torch.Tensor:
    """What each byte means as float8_e4m3fn, (256,) float32."""
    return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()


class Product(torch.autograd.Function):
    """x W^T + b with frozen W and b, of which only the bytes of W are kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(x, decode(weight, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return gradient @ decode(weight, scale, gradient.dtype), None, None, None


class Fp8Linear(torch.nn.Linear):
    """A frozen linear layer as `encode` stores it; it computes in the type of autocast, else of its input.

    The bytes are uint8 for those who do not know float8: gloo, Metal, and peft, which gives adapters the type of a floating-point base.
    """

    def __init__(self, linear: torch.nn.Linear, device: torch.device):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach().to("cpu" if device.type == "mps" else device)
        weight, scale = (tensor.to(device) for tensor in encode(weight))
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        if linear.bias is not None:
            self.bias = torch.nn.Parameter(linear.bias.detach().to(device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)
        return Product.apply(x, self.weight, self.scale, None if self.bias is None else self.bias.to(x.dtype))

    def dequantised(self, dtype: torch.dtype) -> torch.nn.Linear:
        """The same layer with ordinary weights, to be merged or saved."""
        linear = torch.nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = torch.nn.Parameter(decode(self.weight, self.scale, dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = torch.nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear


def store(network: torch.nn.Module, keep_high: tuple[str, ...], device: torch.device) -> None:
    """Put an `Fp8Linear` on `device` in place of every linear layer of `network` but those in `keep_high`: names of modules, which stand for
    all that is in them too, with * for any part of a name."""

    def kept(name: str) -> bool:
        return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in keep_high)

    # Names, not modules: each layer's own weights are freed before the next is read. A subclass may use its weights otherwise.
    for name in [name for name, module in network.named_modules() if type(module) is torch.nn.Linear and not kept(name)]:
        network.set_submodule(name, Fp8Linear(network.get_submodule(name), device))
