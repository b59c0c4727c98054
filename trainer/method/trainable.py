"""The trainable parameters of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainer.distributed.sharding import is_sharded

if TYPE_CHECKING:
    import torch


def trainable_parameters(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Returns the trainable parameters by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def cast_trainable_to_float32(network: torch.nn.Module) -> None:
    """Casts the trainable parameters to float32.

    Updates of 1e-5 vanish when they are added to bfloat16 weights: 95 % of the entries would never change.
    """
    for parameter in trainable_parameters(network).values():
        parameter.data = parameter.data.float()


def set_train_mode(network: torch.nn.Module) -> None:
    """Puts a network in train mode, except layers with running statistics: these keep the checkpoint's.

    Statistics of a batch would depend on the size of the micro-batches. Buffers never train, so a run's checkpoints do
    not hold them.
    """
    network.train()
    for module in network.modules():
        if getattr(module, "track_running_stats", False):
            module.eval()


@contextmanager
def swap_weights(network: torch.nn.Module, weights: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Replaces the trainable parameters inside the block, for example by their moving average; None: does nothing."""
    if weights is None:
        yield
        return
    own_weights = {
        name: parameter.data.clone() if is_sharded(parameter) else parameter.data
        for name, parameter in trainable_parameters(network).items()
    }

    def replace(values: dict[str, torch.Tensor]) -> None:
        for name, parameter in trainable_parameters(network).items():
            if is_sharded(parameter):
                # FSDP gathers blocks from the memory of the shards, so they must stay where they are.
                parameter.data.copy_(values[name])
            else:
                parameter.data = values[name]

    try:
        replace(weights)
        yield
    finally:
        replace(own_weights)
