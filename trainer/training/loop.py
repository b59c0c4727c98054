"""The training loop: yields one `Step` after each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from trainer.core.errors import is_out_of_memory
from trainer.core.rng import seed_for
from trainer.distributed.sharding import full_tensor

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch
    from trainer.optimizer.stochastic_rounding import StochasticRounding
    from trainer.precision.loss_scale import LossScale


@dataclass(slots=True, frozen=True)
class Step:
    """A finished optimizer step."""

    number: int
    loss: float
    """Mean over the global batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    finite: bool = True
    """False if the loss or the gradients were NaN or infinite, so that nothing was updated.

    A gradient that overflows because the loss scale is too high does not count: the loss scale is reduced instead.
    """
    new_micro_batch_size: int | None = None
    """If this step ran out of memory: the largest micro-batch from now on."""


@dataclass(slots=True, kw_only=True)
class TrainingLoop:
    """Trains `parameters`, one optimizer step at a time.

    A step that runs out of memory starts again with micro-batches of half the size, which later steps keep. A step
    whose loss or gradients are not finite leaves weights and optimizer unchanged.
    """

    parameters: list[torch.nn.Parameter]
    losses: Callable[[Batch], torch.Tensor]
    """Loss of each sample of a micro-batch, (b,)."""
    optimizer: torch.optim.Optimizer | StochasticRounding
    learning_rate: Callable[[int], float]
    """Learning rate of a step."""
    batch_size: int
    """Number of samples in the global batch."""
    max_grad_norm: float
    """Gradients with a larger norm are scaled down to it."""
    seed: int
    """Seed of dropout."""
    uninterrupted: Callable[[], AbstractContextManager] = nullcontext
    """Context of an update, in which signals are deferred."""
    update_average: Callable[[int], None] | None = None
    """Updates the average of the weights; called after the update of each step."""
    loss_scale: LossScale | None = None
    """Factor of the loss in the backward pass."""
    reduce: Callable[[list[torch.nn.Parameter], float], float] | None = None
    """Sums the gradients (in place) and the loss (returned) over all processes of the run."""
    may_halve: bool = True
    """False if all processes take part in each forward pass: then none can change its micro-batches alone."""

    def steps(self, batches: Iterable[tuple[int, list[Batch]]]) -> Iterator[Step]:
        """Yields each step after its update, so that the caller can log, evaluate and save.

        `batches` yields step numbers and the micro-batches of this process.
        """
        import torch

        max_size = self.batch_size
        for step, micro_batches in batches:
            # Gradients of this process
            backward = partial(self._backward, step)
            previous_max_size = max_size
            micro_losses, max_size = self._backward_within_memory(backward, micro_batches, max_size)

            # Gradients and loss of the global batch
            reduced_loss = None
            if self.reduce is not None:
                reduced_loss = self.reduce(self.parameters, sum_in_order(loss.item() for loss in micro_losses))
            if self.loss_scale is not None:
                gradients = [p.grad for p in self.parameters if p.grad is not None]
                torch._foreach_mul_(gradients, 1 / self.loss_scale.value)
            norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
            # One transfer for all values: each transfer waits until the GPU has finished its queue.
            *values, grad_norm = torch.stack([*micro_losses, norm]).tolist()
            loss = sum_in_order(values) if reduced_loss is None else reduced_loss

            # Update
            lr = self.learning_rate(step)
            update = math.isfinite(loss) and math.isfinite(grad_norm)
            with self.uninterrupted():
                finite = self._update(step, lr, update, math.isfinite(loss))
                reduced_size = max_size if max_size < previous_max_size else None
                finished = Step(step, loss, grad_norm, lr, finite, reduced_size)
            yield finished

    def _backward_within_memory(
        self, backward: Callable[[list[Batch]], list[torch.Tensor]], micro_batches: list[Batch], max_size: int
    ) -> tuple[list[torch.Tensor], int]:
        """Calls `backward` with micro-batches of at most `max_size` samples; if memory is exhausted, of half the size.

        Returns the losses and the size for which the memory was sufficient.
        """
        while True:
            micro_batches = [part for micro_batch in micro_batches for part in split(micro_batch, max_size)]
            largest = max(map(sample_count, micro_batches), default=0)
            try:
                return backward(micro_batches), max_size
            except (RuntimeError, MemoryError) as error:
                if largest < 2 or not self.may_halve or not is_out_of_memory(error):
                    raise
            # Not in the except block: there, the traceback still keeps the tensors of the failed pass alive.
            max_size = (largest + 1) // 2

    def _backward(self, step: int, micro_batches: list[Batch]) -> list[torch.Tensor]:
        """Computes the gradients of a step. Returns what each micro-batch adds to the loss."""
        import torch

        device = self.parameters[0].device
        # torch.manual_seed would also seed each absent device, and record a stack trace for it.
        generators = [torch.default_generator] + ([] if device.type == "cpu" else [torch.get_device_module(device)])
        self.optimizer.zero_grad(set_to_none=True)
        micro_losses = []
        for index, micro_batch in enumerate(micro_batches):
            # Dropout uses torch's global generators. Seeded here, it does not depend on what ran before.
            for generator in generators:
                generator.manual_seed(seed_for(self.seed, "dropout", step, index))
            # Micro-batches may differ in size, so the sum is divided by the global batch size; a mean of means
            # would be wrong.
            loss = self.losses(micro_batch).sum() / self.batch_size
            (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()
            micro_losses.append(loss.detach())
        return micro_losses

    def _update(self, step: int, lr: float, update: bool, finite_loss: bool) -> bool:
        """Updates weights, their average and loss scale. Returns whether the step counts as finite."""
        overflow = not update and finite_loss and self.loss_scale is not None and self.loss_scale.value > 1
        if not update and not overflow:
            return False
        if self.loss_scale is not None:
            self.loss_scale.update(update)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if update:
            self.optimizer.step()
            if self.update_average is not None:
                self.update_average(step)
        return True


def sum_in_order(values: Iterable[float]) -> float:
    """Returns the sum of floats, added from left to right.

    `sum` adds floats with compensation since Python 3.12, so its result depends on the version.
    """
    result = 0.0
    for value in values:
        result += value
    return result


def sample_count(batch: Batch) -> int:
    """Returns the number of samples in a batch."""
    return len(next(iter(batch.values())))


def split(batch: Batch, max_size: int) -> list[Batch]:
    """Splits a batch into batches of at most `max_size` samples."""
    count = sample_count(batch)
    if count <= max_size:
        return [batch]
    return [
        {name: tensor[start : start + max_size] for name, tensor in batch.items()}
        for start in range(0, count, max_size)
    ]
