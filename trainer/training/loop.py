"""Training itself: one optimizer step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.core.errors import is_out_of_memory
from trainer.core.rng import seed_for
from trainer.distributed.sharding import whole

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
    finite: bool = True
    """False where loss or gradients were not, and nothing was updated with them. A loss scale that was too high is no such case."""
    micro_batch: int | None = None
    """Where memory was too short for more: how many samples a forward pass has from this step on."""


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
    may_halve: bool = True,
) -> Iterator[Step]:
    """Yield each step once its weights are updated; the caller logs, evaluates and saves in between.

    `batches` yields (step, micro-batches); `losses` gives the loss of each sample of a micro-batch, (b,); `rate` the learning rate of a
    step; `average`, where given, follows `parameters` as their exponential moving average. `loss_scale`, where given, scales the loss for the
    backward pass; a step in which it was too high updates nothing, and counts. `reduce`, where given, adds to the gradients and the loss (and
    returns it) those of other processes, whose samples are the rest of the batch. A step that is not finite is yielded as such, with weights
    and optimizer as they were. Where memory is short a step begins again in micro-batches of half the size, and the later ones keep to it;
    what a single sample has no room for is raised, and all where not `may_halve`: where others take part in each forward pass.
    """
    import torch

    device = parameters[0].device
    # torch.manual_seed would also seed, and write down a stack trace for, each kind of device that is not there.
    generators = [torch.default_generator] + ([] if device.type == "cpu" else [torch.get_device_module(device)])

    def accumulate(step: int, micro_batches: list[Batch]) -> list[torch.Tensor]:
        """What each micro-batch adds to the loss of a step, whose gradients the parameters then have."""
        optimizer.zero_grad(set_to_none=True)
        parts = []
        for index, rows in enumerate(micro_batches):
            # Dropout draws from torch's global generators: seeded here, nothing that ran before can change it.
            for generator in generators:
                generator.manual_seed(seed_for(seed, "dropout", step, index))
            # The sum over the samples by the global batch, never a mean of means: the last micro-batch may be smaller.
            part = losses(rows).sum() / batch
            (part if loss_scale is None else part * loss_scale.value).backward()
            parts.append(part.detach())
        return parts

    ceiling = batch
    for step, micro_batches in batches:
        before = ceiling
        while True:
            micro_batches = [piece for rows in micro_batches for piece in pieces(rows, ceiling)]
            largest = max(map(count, micro_batches), default=0)
            try:
                parts = accumulate(step, micro_batches)
                break
            except (RuntimeError, MemoryError) as error:
                if largest < 2 or not may_halve or not is_out_of_memory(error):
                    raise
            # Not before the handler is left: until then the traceback keeps the tensors of the failed pass.
            ceiling = (largest + 1) // 2
        loss = None if reduce is None else reduce(parameters, total(part.item() for part in parts))
        if loss_scale is not None:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / loss_scale.value)
        # All values in one reading: at each a GPU has to come to the end of its queue.
        *values, norm = torch.stack([*parts, whole(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))]).tolist()
        loss = total(values) if loss is None else loss
        lr = rate(step)
        update = math.isfinite(loss) and math.isfinite(norm)
        finite = update or (math.isfinite(loss) and loss_scale is not None and loss_scale.value > 1)
        with uninterrupted():
            if finite and loss_scale is not None:
                loss_scale.follow(update)
            if finite:
                for group in optimizer.param_groups:
                    group["lr"] = lr
            if update:
                optimizer.step()
            if update and average is not None:
                # Short memory at first (TensorFlow's num_updates rule), or the average keeps the untrained start.
                share = 1 - min(decay, (1 + step) / (10 + step))
                for mean, parameter in zip(average, parameters, strict=True):
                    # An average of bfloat16 weights is in float32: it moves by less than they do.
                    mean.lerp_(parameter.data.to(mean.dtype), share)
            finished = Step(step, loss, norm, lr, finite, ceiling if ceiling < before else None)
        yield finished


def total(values: Iterable[float]) -> float:
    """Added one after the other: since Python 3.12 `sum` adds floats in a way of its own, and losses shall be the same bits."""
    result = 0.0
    for value in values:
        result += value
    return result


def count(rows: Batch) -> int:
    return len(next(iter(rows.values())))


def pieces(rows: Batch, size: int) -> list[Batch]:
    """The same samples in micro-batches of at most `size`."""
    if count(rows) <= size:
        return [rows]
    return [{name: tensor[i : i + size] for name, tensor in rows.items()} for i in range(0, count(rows), size)]
