"""The batches of a run. Their content is a function of (seed, step) alone.

A *visit* is one use of a sample for training. Visits are numbered through the whole run: step s of batch size B
consists of the visits (s - 1) B .. s B - 1, and each epoch of N visits contains every one of the N samples once, in a
random order. A batch may contain visits of two epochs. All random numbers of a visit are functions of (seed, visit,
sample id).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from trainer.cache.store import Cache
from trainer.core.batch import Batch, Example, collate, group_by_shape
from trainer.core.rng import generator, normal, uniform

if TYPE_CHECKING:
    import numpy as np

    from trainer.dataset import Dataset
    from trainer.dataset.sample import Sample
    from trainer.dataset.transform import Transform, TransformedSample
    from trainer.model import Family


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, sample_count: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(sample_count)


def visits_of_step(seed: int, step: int, batch_size: int, sample_count: int) -> list[tuple[int, int]]:
    """Returns the (visit, sample index) pairs in the global batch of a step (1, 2, ...)."""
    first = (step - 1) * batch_size
    return [
        (visit, int(_permutation(seed, visit // sample_count, sample_count)[visit % sample_count]))
        for visit in range(first, first + batch_size)
    ]


@dataclass(slots=True)
class Batches:
    """Maps a step to the micro-batches of this process.

    A micro-batch contains the cached tensors of its samples, `noise` in the shape of the latents, the time `t`, and
    with `has_loss_weights` the `weight` of each latent pixel in the loss. All images of a micro-batch have the same
    size. Of `world_size` processes, the one of rank r gets the visits r, r + world_size, ... of each batch, possibly
    none.
    """

    samples: list[Sample]
    cache: Cache
    family: Family
    settings: Dataset
    transform: Transform
    seed: int
    batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    has_loss_weights: bool = False
    _time_shifts: dict[tuple[int, int], float] = field(default_factory=dict, init=False)

    def visits(self, step: int) -> list[tuple[int, int]]:
        """Returns the (visit, sample index) pairs in the global batch of a step."""
        return visits_of_step(self.seed, step, self.batch_size, len(self.samples))

    def local_visits(self, step: int) -> list[tuple[int, int]]:
        """Returns the (visit, sample index) pairs of this process."""
        return self.visits(step)[self.rank :: self.world_size]

    def sample_ids(self, step: int) -> list[str]:
        """Returns the ids of the samples in the global batch of a step."""
        return [self.samples[index].id for _, index in self.visits(step)]

    def local_sample_ids(self, step: int) -> list[str]:
        """Returns the ids of the samples of this process."""
        return [self.samples[index].id for _, index in self.local_visits(step)]

    def transformed(self, visit: int, index: int) -> TransformedSample:
        """Returns the sample of a visit, which is flipped or loses its caption or controls at random."""
        sample, settings = self.samples[index], self.settings
        return self.transform.apply(
            sample,
            flip=settings.flip and uniform(self.seed, "flip", visit, sample.id) < 0.5,
            drop_caption=uniform(self.seed, "caption dropout", visit, sample.id) < settings.caption_dropout,
            drop_control=uniform(self.seed, "control dropout", visit, sample.id) < settings.control_dropout,
        )

    def example(self, visit: int, index: int) -> Example:
        """Returns the tensors of a visit."""
        import torch

        transformed = self.transformed(visit, index)
        example = self.cache.example(transformed)
        sample = transformed.sample
        shape = tuple(example["latents"].shape)
        if "latents_std" in example:
            noise = normal(shape, self.seed, "posterior", visit, sample.id)
            example["latents"] = example["latents"] + example.pop("latents_std") * noise
        if self.has_loss_weights:
            floor = self.settings.mask_floor
            mask = example.pop("mask", torch.ones(1, 1, 1))
            example["weight"] = sample.weight * (floor + (1 - floor) * mask).expand(1, *shape[1:])
        # The offset keeps the quantile away from 0, where the quantile function of a normal distribution is infinite.
        quantile = uniform(self.seed, "time", visit, sample.id) + 2**-54
        example["noise"] = normal(shape, self.seed, "noise", visit, sample.id)
        example["t"] = torch.tensor(self.family.objective.quantile_to_time(quantile, self._time_shift(*shape[1:])))
        return example

    def _time_shift(self, height: int, width: int) -> float:
        # Remembered, because a family may read files to compute it.
        if (height, width) not in self._time_shifts:
            self._time_shifts[height, width] = self.family.time_shift(height, width)
        return self._time_shifts[height, width]

    def padding(self, step: int) -> Batch:
        """Returns a micro-batch of one sample that does not count in the loss.

        Under FSDP a process needs it if another process has more micro-batches.
        """
        import torch

        example = self.example(*self.visits(step)[0])
        return collate([example | {"loss_mask": torch.tensor(0.0)}])

    def __getitem__(self, step: int) -> tuple[int, list[Batch]]:
        """Returns the step, and the micro-batches of this process."""
        examples = [self.example(*visit) for visit in self.local_visits(step)]
        groups = group_by_shape(examples, self.micro_batch_size)
        return step, [collate([examples[i] for i in group]) for group in groups]
