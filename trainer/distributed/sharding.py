"""A network divided among processes, so that together they hold what one device cannot: FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each process keeps its part of every tensor; those of a block are put together for the block's forward and backward pass and dropped after it.
All that is done to weights one by one (optimizer, average, norm) is done to the parts. On the disk tensors are whole: a checkpoint does not tell
how it was made. What trains beside frozen weights is small, and stays whole in each process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trainer.core.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh


def asked() -> bool:
    """Whether the launcher's settings ask for a network in parts. Raises errors.UsageError for what they ask for that is not done."""
    if not _on("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "accelerate's settings ask for FSDP 1; type fsdp_version: 2 there (launch/fsdp2.yaml), or --fsdp_version 2"
        )
    if _on("FSDP_OFFLOAD_PARAMS"):
        raise UsageError(
            "accelerate's fsdp_offload_params is not supported; set it to false, and start more processes where memory lacks"
        )
    if _on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UsageError(
            "accelerate's fsdp_activation_checkpointing is not used; set it to false and type hardware.gradient_checkpointing=true"
        )
    return True


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")


def divide(network: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Keep this process's part of each tensor, on the mesh's device; the network may lie elsewhere, and need not fit there whole."""
    import torch
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # Of views it warns, for who might write on them in place; that fails in the backward pass, where it is done.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    parameters = list(network.parameters())
    # An adapter in float32 beside frozen weights of another type, where one group of tensors should have one.
    whole = {p for p in parameters if p.requires_grad} if not all(p.requires_grad for p in parameters) else set()
    options = {"mesh": mesh, "ignored_params": whole, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    for called in entered(network):
        for block in blocks(called):
            fully_shard(block, **options)
        # Else torch leaves the outermost tensors whole until a backward pass, which an evaluation does not have.
        fully_shard(called, reshard_after_forward=True, **options)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # Sums, as everywhere: each process's loss is divided by the global batch.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # Each now has a class of torch's; transformers looks up by its class's full name what a network can be asked for.
            _, _, own, *_ = type(module).__mro__
            type(module).__module__, type(module).__qualname__ = own.__module__, own.__qualname__
    network.to(mesh.device_type)


def entered(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules whose forward pass is entered from outside: the network, or where it only holds networks, each of them."""
    from torch.nn import Module

    if type(module).forward is not Module.forward:
        yield module
        return
    for child in module.children():
        yield from entered(child)


def blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """What is put together at a time: the items of the outermost lists of modules, which are a network's repeated blocks."""
    from torch.nn import ModuleList

    for child in module.children():
        yield from child if isinstance(child, ModuleList) else blocks(child)


def is_part(tensor: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this process keeps of a whole tensor where it keeps `like` of another of this shape; no process is asked."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def parts(state: dict[str, Any], parameters: list[torch.Tensor]) -> dict[str, Any]:
    """An optimizer's `state_dict` of whole tensors -> that of this process's parts of `parameters`; as it is where they are whole."""
    import torch

    if not any(map(is_part, parameters)):
        return state

    def divided(value: Any, parameter: torch.Tensor) -> Any:
        is_like = isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return part(value, parameter) if is_like else value

    moments = {
        i: {name: divided(value, parameters[i]) for name, value in of_one.items()}
        for i, of_one in state["state"].items()
    }
    return state | {"state": moments}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which this process may have only a part; all processes must ask for it."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def gathered(value: Any, keep: bool) -> Any:
    """Nested dicts with every part in them made whole, which all processes must do; only who keeps them has them afterwards, on the CPU."""
    if isinstance(value, dict):
        return {key: gathered(item, keep) for key, item in value.items()}
    if not is_part(value):
        return value
    tensor = whole(value.detach())
    return tensor.cpu() if keep else None
