"""Least squares on five samples, to test the training loop."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from trainer.core.rng import normal
from trainer.precision.loss_scale import LossScale
from trainer.training.average import update_moving_average
from trainer.training.loop import Step, TrainingLoop

ALL_SAMPLES = [[0, 1, 2, 3, 4]]


@dataclass(slots=True)
class Result:
    """The steps of a training, with the weights (and their moving average) after each of them."""

    steps: list[Step] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    averages: list[torch.Tensor] = field(default_factory=list)


def train(
    micro_batches: Sequence[list[int]] = ALL_SAMPLES,
    *,
    steps: int,
    momentum: float = 0.0,
    max_grad_norm: float = 1e9,
    decay: float | None = None,
    nan_samples: Collection[int] = (),
    loss_scale: LossScale | None = None,
    overflow_at: Collection[int] = (),
    max_gradient: float = 1000.0,
) -> Result:
    """Trains three weights with SGD.

    `micro_batches` are indices of samples. The targets of `nan_samples` are NaN. In the steps `overflow_at`, gradients
    by the predictions become infinite if they exceed `max_gradient`. `decay` is that of a moving average from zeros.
    """
    x, y = normal((5, 3), "x"), normal((5,), "y")
    y[list(nan_samples)] = torch.nan
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = None if decay is None else [torch.zeros(3)]

    def losses(batch: dict) -> torch.Tensor:
        loss = (batch["x"] @ parameter - batch["y"]) ** 2
        if batch["step"][0] in overflow_at:
            loss.register_hook(lambda gradient: gradient * (math.inf if gradient.abs().max() > max_gradient / 5 else 1))
        return loss

    loop = TrainingLoop(
        parameters=[parameter],
        losses=losses,
        optimizer=torch.optim.SGD([parameter], lr=0.1, momentum=momentum),
        learning_rate=lambda step: 0.1,
        batch_size=5,
        max_grad_norm=max_grad_norm,
        seed=0,
        update_average=(None if decay is None else partial(update_moving_average, average, [parameter], decay)),
        loss_scale=loss_scale,
    )
    batches = (
        (step, [{"x": x[rows], "y": y[rows], "step": torch.full((len(rows),), step)} for rows in micro_batches])
        for step in range(1, steps + 1)
    )
    result = Result()
    for step in loop.steps(batches):
        result.steps.append(step)
        result.weights.append(parameter.detach().clone())
        if average is not None:
            result.averages.append(average[0].clone())
    return result
