"""Linear layers whose frozen weights are stored in fewer than 16 bits.

The backward pass decodes the weights again. Where a library decodes them before an ordinary product (diffusers' layerwise casting, torchao),
autograd keeps every 16-bit copy until then, and the peak of a step is above that of 16-bit storage.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

Decode = Callable[..., torch.Tensor]


class Product(torch.autograd.Function):
    """x W^T + b with frozen W = decode(dtype, *stored) and b, of which only what is stored of W is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, decode: Decode, *stored: torch.Tensor) -> torch.Tensor:
        ctx.decode = decode
        ctx.save_for_backward(*stored)
        return functional.linear(x, decode(x.dtype, *stored), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Asked for once: checkpointing makes them anew each time, and refuses a second.
        stored = ctx.saved_tensors
        return gradient @ ctx.decode(gradient.dtype, *stored), None, None, *(None for _ in stored)


class StoredLinear(torch.nn.Linear):
    """A frozen linear layer that keeps `stored`, of which `decode(dtype, *stored)` makes its weights (out, in). It computes in the type of
    autocast, else of its input.

    `weight` is what its products see, in float32 and made anew each time: adapters ask the frozen layer for its shape, its norms (DoRA) and
    what to merge with, and none of that is known of codes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: torch.Tensor | None,
        decode: Decode,
        codes: torch.Tensor,
        **others: torch.Tensor,
    ):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.decode, self.others = in_features, out_features, decode, tuple(others)
        self.codes = torch.nn.Parameter(codes, requires_grad=False)
        for name, tensor in others.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)

    def stored(self) -> tuple[torch.Tensor, ...]:
        return self.codes, *(getattr(self, name) for name in self.others)

    @property
    def weight(self) -> torch.Tensor:
        with torch.no_grad():
            return self.decode(torch.float32, *self.stored())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.requires_grad and torch.is_grad_enabled():
            return Product.apply(x, bias, self.decode, *self.stored())
        # torch.compile cannot follow the other way where there is no gradient.
        return functional.linear(x, self.decode(x.dtype, *self.stored()), bias)


Read = Callable[[str], torch.Tensor]
Make = Callable[[torch.Tensor, torch.device], tuple[Decode, dict[str, torch.Tensor]]]
"""Weights (out, in) -> how they are decoded, and what is kept of them, on a device."""


def maker(make: Make, keep_high: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> Callable:
    """What `trainer.model.filled` asks for each layer: a `StoredLinear` on `device` in place of every linear layer but those in `keep_high`:
    names of modules, which stand for all that is in them too, with * for any part of a name."""

    def kept(name: str) -> bool:
        return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in keep_high)

    def stored(name: str, layer: torch.nn.Module, read: Read) -> torch.nn.Module | None:
        # A subclass may use its weights otherwise.
        if type(layer) is not torch.nn.Linear or kept(name):
            return None
        decode, tensors = make(read(f"{name}.weight"), device)
        return StoredLinear(
            layer.in_features, layer.out_features, bias_of(name, layer, read, dtype, device), decode, **tensors
        )

    return stored


def bias_of(
    name: str, layer: torch.nn.Linear, read: Read, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    return None if layer.bias is None else read(f"{name}.bias").to(device, dtype)
