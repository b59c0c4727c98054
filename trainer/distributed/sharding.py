"""Shards a network over several processes with FSDP2 (`torch.distributed.fsdp.fully_shard`) to save memory.

Each process holds its shard of every tensor. The tensors of a block are gathered for its forward and backward pass and
freed afterwards. Operations on individual weights (optimizer, moving average, gradient norm) work on shards.
Checkpoints hold full tensors, so they do not depend on the number of processes. Trainable parameters beside frozen
weights are small and are replicated on each process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

from trainer.core.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_requested() -> bool:
    """Returns whether the launcher's settings request a sharded network.

    Raises errors.UsageError if they request an unsupported option.
    """
    if not _is_true("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "accelerate's settings request FSDP 1; type fsdp_version: 2 there (launch/fsdp2.yaml), or --fsdp_version 2"
        )
    if _is_true("FSDP_OFFLOAD_PARAMS"):
        raise UsageError(
            "accelerate's fsdp_offload_params is not supported; set it to false, and start more processes if memory is "
            "short"
        )
    if _is_true("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UsageError(
            "accelerate's fsdp_activation_checkpointing is not used; set it to false and type "
            "hardware.gradient_checkpointing=true"
        )
    return True


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")


def shard(network: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Shards a network in place, on the device of the mesh.

    The network may be on another device and need not fit on this one.
    """
    import torch
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # FSDP2 warns that its outputs are views and should not be modified in place. If they are, the backward pass fails.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    parameters = list(network.parameters())
    # FSDP2 requires one dtype per group of tensors, but adapters are float32 and frozen weights often are not.
    trains_all = all(p.requires_grad for p in parameters)
    replicated = set() if trains_all else {p for p in parameters if p.requires_grad}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    options: Any = {"mesh": mesh, "ignored_params": replicated, "mp_policy": policy}
    for module in entry_modules(network):
        for block in repeated_blocks(module):
            fully_shard(block, **options)
        # By default the outermost tensors stay gathered until the backward pass, which an evaluation does not have.
        fully_shard(module, reshard_after_forward=True, **options)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # Sum gradients, do not average them: each process has already divided its loss by the global batch size.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # fully_shard has replaced the class. Restore its full name, by which transformers looks up model features.
            _, _, original, *_ = type(module).__mro__
            type(module).__module__, type(module).__qualname__ = original.__module__, original.__qualname__
    network.to(mesh.device_type)


def entry_modules(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yields the modules whose `forward` is called from outside: the network, or each network of a container."""
    from torch.nn import Module

    if type(module).forward is not Module.forward:
        yield module
        return
    for child in module.children():
        yield from entry_modules(child)


def repeated_blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yields the items of the outermost `ModuleList`s: the repeated blocks of a network, gathered one at a time."""
    from torch.nn import ModuleList

    for child in module.children():
        yield from child if isinstance(child, ModuleList) else repeated_blocks(child)


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Returns whether this process holds only a shard of the tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns this process's shard of a full tensor, laid out like `like`. Without communication between processes."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard_optimizer_state(state: dict[str, Any], parameters: list[torch.Tensor]) -> dict[str, Any]:
    """Shards the full tensors of an optimizer's `state_dict` like `parameters`.

    Returns it unchanged if these are not sharded.
    """
    import torch

    if not any(map(is_sharded, parameters)):
        return state

    def shard_value(value: Any, parameter: torch.Tensor) -> Any:
        has_its_shape = isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return shard_like(value, parameter) if has_its_shape else value

    sharded = {
        index: {name: shard_value(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return state | {"state": sharded}


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the full tensor of a shard. All processes must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gather(state: Any, keep: bool) -> Any:
    """Returns nested dicts in which every shard is replaced by its full tensor on the CPU, or by None unless `keep`.

    All processes must call this. torch's `get_model_state_dict` and `get_optimizer_state_dict` do not replace it: they
    need modules, which a moving average is not, and key the optimizer state by name, while checkpoints use the index.
    """
    if isinstance(state, dict):
        return {key: gather(value, keep) for key, value in state.items()}
    if not is_sharded(state):
        return state
    tensor = full_tensor(state.detach())
    return tensor.cpu() if keep else None
