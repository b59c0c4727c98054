"""Measures the memory and the work of code that runs on tensors without values."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


class LiveMemory(TorchDispatchMode):
    """Follows the storages that operations create until they are freed, and counts what the operations do.

    Enter it after a `FakeTensorMode`. Temporary memory inside a kernel is not seen. torch's FlopCounterMode is not used
    as it is, because its hooks keep activations alive.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.bytes = 0
        """Size of the live storages that were created inside, or passed to `add`."""
        self.peak = 0
        """Largest value of `bytes`."""
        self.gradient_bytes = 0
        """Size of the gradients of parameters so far; see `count_gradients`."""
        self.gradient_bytes_at_peak = 0
        self.work: dict[tuple[str, int, int], int] = {}
        """Number of operations by (dtype of the result, FLOPs, bytes read and written)."""
        self._device = device
        self._live: dict[int, weakref.ref] = {}

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products, convolutions and attention; a multiply-add counts as two."""
        return sum(count * flops for (_, flops, _), count in self.work.items())

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the memory of a tensor, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return

        def freed(_: weakref.ref) -> None:
            del self._live[key]
            self.bytes -= size

        self._live[key] = weakref.ref(storage, freed)
        self.bytes += size
        if self.bytes > self.peak:
            self.peak, self.gradient_bytes_at_peak = self.bytes, self.gradient_bytes

    def count_gradients(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        """Counts the gradients of these parameters when they are accumulated for the first time."""

        def counter(parameter: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
            def count(_: torch.Tensor) -> None:
                self.gradient_bytes += parameter.nbytes
                handle.remove()

            handle = parameter.register_post_accumulate_grad_hook(count)
            return count

        for parameter in parameters:
            if parameter.grad is not None:
                self.add(parameter.grad)
                self.gradient_bytes += parameter.nbytes
            else:
                counter(parameter)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            # Two of three calls; the fake mode would take much longer.
            return self._device
        kwargs = kwargs or {}
        if func is aten.rand.default and math.prod(args[0]) == 1:
            # LoKr and LoHa of peft draw such a number to leave out layers (module dropout), and need its value.
            return torch.tensor(0.5).expand(args[0])
        result = func(*args, **kwargs)
        if is_view(func):
            return result
        moved = 0
        for tensor in (*args, result):
            for item in tensor if isinstance(tensor, list | tuple) else (tensor,):
                if isinstance(item, torch.Tensor):
                    moved += item.numel() * item.element_size()
        first = result
        if isinstance(result, torch.Tensor):
            self.add(result)
        elif isinstance(result, list | tuple):
            tensors = [item for item in result if isinstance(item, torch.Tensor)]
            for item in tensors:
                self.add(item)
            first = tensors[0] if tensors else None
        dtype = str(first.dtype).removeprefix("torch.") if isinstance(first, torch.Tensor) else ""
        count = flop_counter(func)
        key = dtype, 0 if count is None else count(*args, **kwargs, out_val=result), moved
        self.work[key] = self.work.get(key, 0) + 1
        return result


@cache
def is_view(func: Any) -> bool:
    """Returns whether the result of an operation is a view of an argument, so that nothing is computed."""
    returned = func._schema.returns
    return bool(returned) and all(value.alias_info is not None and not value.alias_info.is_write for value in returned)


@cache
def flop_counter(func: Any) -> Callable[..., int] | None:
    """Returns the function that counts the floating-point operations of a call; None for cheap operations."""
    registry: dict[Any, Any] = {**flop_registry, **CPU_ATTENTION}
    return registry.get(func.overloadpacket)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Attention kernels that torch's registry lacks."""
