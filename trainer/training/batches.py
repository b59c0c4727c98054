"""The batches of a run. Their content is a function of (seed, step) alone; see `visits`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.cache.store import Cache
from trainer.core.batch import Batch, Example, collate, group_by_shape
from trainer.core.rng import normal, uniform
from trainer.training.visits import Visit, Visits

if TYPE_CHECKING:
    from trainer.model import Family


@dataclass(slots=True)
class Batches:
    """Maps a step to the micro-batches of this process.

    A micro-batch contains the cached tensors of its samples, `noise` in the shape of the latents, the time `t`, and,
    if the loss weights some samples or parts of their images more than others, the `weight` of each latent pixel. All
    images of a micro-batch have the same size. Of `world_size` processes, the one of rank r gets the visits r,
    r + world_size, ... of each batch, possibly none.
    """

    visits: Visits
    cache: Cache
    family: Family
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    has_loss_weights: bool = field(init=False)
    """Whether micro-batches have `weight`."""
    _time_shifts: dict[tuple[int, int], float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        samples = (*self.visits.training, *self.visits.regularization)
        self.has_loss_weights = any(sample.mask or sample.weight != 1 for sample in samples)

    def local_visits(self, step: int) -> list[Visit]:
        """Returns the visits of this process in the global batch of a step."""
        return self.visits.of_step(step)[self.rank :: self.world_size]

    def sample_ids(self, step: int) -> list[str]:
        """Returns the ids of the samples in the global batch of a step."""
        return [visit.sample.id for visit in self.visits.of_step(step)]

    def local_sample_ids(self, step: int) -> list[str]:
        """Returns the ids of the samples of this process."""
        return [visit.sample.id for visit in self.local_visits(step)]

    def example(self, visit: Visit) -> Example:
        """Returns the tensors of a visit."""
        import torch

        seed, names = self.visits.seed, (visit.number, visit.sample.id)
        example = self.cache.example(self.visits.transformed(visit))
        shape = tuple(example["latents"].shape)
        if "latents_std" in example:
            noise = normal(shape, seed, "posterior", *names)
            example["latents"] = example["latents"] + example.pop("latents_std") * noise
        if self.has_loss_weights:
            floor = self.visits.settings.mask_floor
            mask = example.pop("mask", torch.ones(1, 1, 1))
            example["weight"] = visit.sample.weight * (floor + (1 - floor) * mask).expand(1, *shape[1:])
        # The offset keeps the quantile away from 0, where the quantile function of a normal distribution is infinite.
        quantile = uniform(seed, "time", *names) + 2**-54
        example["noise"] = self.family.objective.draw_noise(shape, seed, "noise", *names)
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

        example = self.example(self.visits.of_step(step)[0])
        return collate([example | {"loss_mask": torch.tensor(0.0)}])

    def __getitem__(self, step: int) -> tuple[int, list[Batch]]:
        """Returns the step, and the micro-batches of this process."""
        examples = [self.example(visit) for visit in self.local_visits(step)]
        groups = group_by_shape(examples, self.micro_batch_size)
        return step, [collate([examples[i] for i in group]) for group in groups]
