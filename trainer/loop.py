"""Training itself: one optimizer step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.errors import Numerics
from trainer.streams import number

if TYPE_CHECKING:
    import torch

    from trainer.precision import LossScale

Batch = dict[str, "torch.Tensor"]


@dataclass(slots=True, frozen=True)
class Step:
    """One finished optimizer step. `loss` is the mean over the global batch; `grad_norm` is before clipping."""

    number: int
    loss: float
    grad_norm: float
    lr: float


def fit(
    parameters: list[torch.nn.Parameter],
    losses: Callable[[Batch], torch.Tensor],
    batches: Iterable[tuple[int, list[Batch]]],
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    uninterrupted: Callable[[], AbstractContextManager],
    *,
    batch: int,
    max_grad_norm: float,
    seed: int,
    average: list[torch.Tensor] | None = None,
    decay: float = 0.0,
    loss_scale: LossScale | None = None,
    reduce: Callable[[list[torch.nn.Parameter], float], float] | None = None,
) -> Iterator[Step]:
    """Yield each step once its weights are updated; the caller logs, evaluates and saves in between.

    `batches` yields (step, micro-batches); `losses` gives the loss of each sample of a micro-batch, (b,); `rate` the learning rate of a
    step; `average`, where given, follows `parameters` as their exponential moving average. `loss_scale`, where given, scales the loss for the
    backward pass; a step in which it was too high updates nothing, and counts. `reduce`, where given, adds to the gradients and the loss (and
    returns it) those of other processes, whose samples are the rest of the batch. Raises errors.Numerics before an update that is not finite,
    with weights and optimizer as they were.
    """
    import torch

    for step, micro_batches in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for index, rows in enumerate(micro_batches):
            # Dropout draws from torch's global generator: seeded here, nothing that ran before can change it.
            torch.manual_seed(number(seed, "dropout", step, index))
            # The sum over the samples by the global batch, never a mean of means: the last micro-batch may be smaller.
            part = losses(rows).sum() / batch
            (part if loss_scale is None else part * loss_scale.value).backward()
            loss += part.item()
        if reduce is not None:
            loss = reduce(parameters, loss)
        if loss_scale is not None:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / loss_scale.value)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
        finite = math.isfinite(norm)
        if not math.isfinite(loss) or not (finite or (loss_scale is not None and loss_scale.value > 1)):
            raise Numerics(f"At step {step} the loss is {loss} and the gradient norm {norm}; nothing was updated with them.")
        lr = rate(step)
        with uninterrupted():
            if loss_scale is not None:
                loss_scale.follow(finite)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if finite:
                optimizer.step()
            if finite and average is not None:
                # Short memory at first (TensorFlow's num_updates rule), or the average keeps the untrained start.
                torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(decay, (1 + step) / (10 + step)))
            finished = Step(step, loss, norm, lr)
        yield finished
