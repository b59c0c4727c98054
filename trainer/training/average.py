"""The average of the weights over the steps, which is evaluated and exported in their place if a run keeps one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trainer.config.schema import Run
from trainer.distributed.sharding import shard_like

if TYPE_CHECKING:
    import torch


def keeps_average(run: Run) -> bool:
    """Returns whether a run keeps an average: its own moving average, or that of the optimizer."""
    return run.ema is not None or run.optimizer.averages_weights


def initial_average(
    parameters: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns float32 copies of the tensors in `source` on the devices, and with the sharding, of `parameters`."""
    return {
        name: shard_like(source[name].detach().float().clone().to(parameter.device), parameter)
        for name, parameter in parameters.items()
    }


def update_average(
    run: Run, average: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor], optimizer: Any, step: int
) -> None:
    """Updates the average in place after step `step` (1, 2, ...)."""
    if run.optimizer.averages_weights:
        run.optimizer.write_average(optimizer, average.values())
    else:
        assert run.ema is not None
        update_moving_average(average.values(), parameters.values(), run.ema, step)


def update_moving_average(
    average: Iterable[torch.Tensor], parameters: Iterable[torch.Tensor], decay: float, step: int
) -> None:
    """Updates an exponential moving average in place after step `step` (1, 2, ...)."""
    # The decay rises during the first steps (num_updates in TensorFlow's ExponentialMovingAverage), or the average
    # would keep the untrained weights for too long.
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for mean, parameter in zip(average, parameters, strict=True):
        # The average of bfloat16 weights is float32: its changes are smaller than bfloat16 can represent.
        mean.lerp_(parameter.data.to(mean.dtype), weight)
