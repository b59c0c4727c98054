"""Linear layers with frozen weights of fewer than 16 bits.

The backward pass dequantizes the weights again. Libraries that dequantize them before an ordinary product (diffusers'
layerwise casting, torchao) let autograd keep all 16-bit copies until then, so a step needs more memory than with 16-bit
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

Dequantize = Callable[..., torch.Tensor]
"""`dequantize(dtype, *tensors)` returns weights (out, in) in `dtype`."""
Multiply = Callable[..., torch.Tensor]
"""`multiply(x, *tensors)` returns x W^T in the dtype of x, without dequantized weights."""
QuantizedWeight = tuple[Dequantize, dict[str, torch.Tensor]]
"""A `Dequantize` function and its tensors by name. The first is `codes`, which stands for the weights."""
QuantizeWeight = Callable[[torch.Tensor, torch.device], QuantizedWeight]
"""Quantizes weights (out, in) on a device."""
ReadTensor = Callable[[str], torch.Tensor]
"""Reads a tensor of the checkpoint by name."""
QuantizeLayer = Callable[[str, torch.nn.Module, ReadTensor], torch.nn.Module | None]
"""`quantize(name, layer, read)` returns a quantized layer to put in place of `layer`, or None to keep it."""


class QuantizedProduct(torch.autograd.Function):
    """x W^T + b with frozen W = dequantize(dtype, *tensors) and b. Only `tensors` are saved for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        dequantize: Dequantize,
        multiply: Multiply | None,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.dequantize = dequantize
        ctx.save_for_backward(*tensors)
        return product(x, bias, dequantize, multiply, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Read once: gradient checkpointing recomputes saved tensors on the first access, and refuses a second.
        tensors = ctx.saved_tensors
        return gradient @ ctx.dequantize(gradient.dtype, *tensors), None, None, None, *(None for _ in tensors)


def product(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    dequantize: Dequantize,
    multiply: Multiply | None,
    *tensors: torch.Tensor,
) -> torch.Tensor:
    """Returns x W^T + b: by `multiply`, or with dequantized weights if it is None."""
    if multiply is None:
        return functional.linear(x, dequantize(x.dtype, *tensors), bias)
    result = multiply(x, *tensors)
    return result if bias is None else result + bias


class QuantizedLinear(torch.nn.Linear):
    """Frozen linear layer with quantized weights. It computes in the dtype of autocast, or in that of its input."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: torch.Tensor | None,
        dequantize: Dequantize,
        codes: torch.Tensor,
        **other_tensors: torch.Tensor,
    ):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.dequantize, self.tensor_names = dequantize, ("codes", *other_tensors)
        self.multiply: Multiply | None = None
        self.codes = torch.nn.Parameter(codes, requires_grad=False)
        for name, tensor in other_tensors.items():
            self.register_buffer(name, tensor)
        self.register_parameter(
            "bias", None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        )

    def quantized_tensors(self) -> tuple[torch.Tensor, ...]:
        """Returns the tensors that `dequantize` takes."""
        return tuple(getattr(self, name) for name in self.tensor_names)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a parameter in torch.nn.Linear
        """Dequantized weights in float32, computed at each access.

        Adapters ask the frozen layer for its shape, for its norms (DoRA) and for the weights to merge with.
        """
        with torch.no_grad():
            return self.dequantize(torch.float32, *self.quantized_tensors())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device_type = x.device.type
        x = x.to(torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        arguments: tuple[Any, ...] = (x, bias, self.dequantize, self.multiply, *self.quantized_tensors())
        if x.requires_grad and torch.is_grad_enabled():
            return QuantizedProduct.apply(*arguments)
        # torch.compile cannot trace the autograd function if there is no gradient.
        return product(*arguments)


def linear_quantizer(
    quantize_weight: QuantizeWeight,
    unquantized_modules: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device,
    multiply: Multiply | None = None,
) -> QuantizeLayer:
    """Returns a function that quantizes each linear layer on `device`, except those in `unquantized_modules`.

    These are names of modules, with * as a wildcard; a name includes all modules inside. Biases get `dtype`. If
    `multiply` is not None, the forward pass multiplies with it.
    """

    def stays_unquantized(name: str) -> bool:
        return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in unquantized_modules)

    def quantize(name: str, layer: torch.nn.Module, read: ReadTensor) -> torch.nn.Module | None:
        # A subclass of Linear may use its weights in another way.
        if type(layer) is not torch.nn.Linear or stays_unquantized(name):
            return None
        weight = quantize_weight(read(f"{name}.weight"), device)
        quantized = quantized_layer(name, layer, weight, read, dtype, device)
        quantized.multiply = multiply
        return quantized

    return quantize


def quantized_layer(
    name: str,
    layer: torch.nn.Linear,
    weight: QuantizedWeight,
    read: ReadTensor,
    dtype: torch.dtype,
    device: torch.device,
) -> QuantizedLinear:
    """Returns the quantized layer with the size of `layer`; its bias is read and gets `dtype`."""
    bias = None if layer.bias is None else read(f"{name}.bias").to(device, dtype)
    dequantize, tensors = weight
    return QuantizedLinear(layer.in_features, layer.out_features, bias, dequantize, **tensors)
