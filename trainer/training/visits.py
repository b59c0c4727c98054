"""Which samples a run trains on at which step, and how: a function of (seed, step) alone.

A *visit* is one use of a sample for training. Visits are numbered through the whole run: step s of batch size B
consists of the visits (s - 1) B .. s B - 1. Each epoch of N visits contains every one of the N samples once, in a
random order, and a batch may contain visits of two epochs. Regularization images take a fixed share of the visits, and
have epochs of their own. All random numbers of a visit are functions of (seed, visit, sample id).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

from trainer.core.rng import generator, uniform
from trainer.dataset.tags import shuffled_captions

if TYPE_CHECKING:
    import numpy as np

    from trainer.dataset import Dataset
    from trainer.dataset.sample import Sample
    from trainer.dataset.transform import Resolution, Transform, TransformedSample


@dataclass(slots=True, frozen=True)
class Visit:
    """One use of a sample for training, at one resolution."""

    number: int
    sample: Sample
    resolution: Resolution


@dataclass(slots=True, frozen=True)
class Visits:
    """The visits of a run.

    `training` and `regularization` are the samples of one epoch; a sample with `repeats` occurs that often.
    """

    seed: int
    batch_size: int
    settings: Dataset
    transform: Transform
    training: Sequence[Sample]
    regularization: Sequence[Sample] = ()

    def of_step(self, step: int) -> list[Visit]:
        """Returns the visits in the global batch of a step (1, 2, ...)."""
        first = (step - 1) * self.batch_size
        return [self.visit(number) for number in range(first, first + self.batch_size)]

    def visit(self, number: int) -> Visit:
        """Returns a visit (0, 1, ...)."""
        before = self._regularization_count(number)
        if self._regularization_count(number + 1) == before:
            sample = self._sample(self.training, number - before, "order")
        else:
            sample = self._sample(self.regularization, before, "order of regularization")
        quantile = uniform(self.seed, "resolution", number, sample.id) if len(self.transform.resolutions) > 1 else 0
        return Visit(number, sample, self.transform.choose_resolution(sample.image, quantile))

    def transformed(self, visit: Visit) -> TransformedSample:
        """Returns the sample of a visit, which is flipped, shuffled, or loses its caption or controls at random."""
        settings, names = self.settings, (visit.number, visit.sample.id)
        captions = shuffled_captions(settings, visit.sample.caption)
        return self.transform.apply(
            visit.sample,
            visit.resolution,
            flip=settings.flip and uniform(self.seed, "flip", *names) < 0.5,
            drop_caption=uniform(self.seed, "caption dropout", *names) < settings.caption_dropout,
            drop_control=uniform(self.seed, "control dropout", *names) < settings.control_dropout,
            shuffled_caption=captions[int(uniform(self.seed, "tag order", *names) * len(captions))],
        )

    def training_count(self, steps: int) -> int:
        """Returns the number of visits in the first steps that are not of regularization images."""
        count = steps * self.batch_size
        return count - self._regularization_count(count)

    def steps_for(self, training_count: int) -> int:
        """Returns the smallest number of steps with this `training_count`, or a larger one."""
        # n visits contain ceil(n (1 - share)) of training samples.
        visits = (training_count - 1) // (1 - self._share) + 1
        return -(-visits // self.batch_size)

    def counts(self, steps: int) -> Counter[tuple[Sample, Resolution]]:
        """Returns how often the first steps visit each sample at each resolution."""
        visits = map(self.visit, range(steps * self.batch_size))
        return Counter((visit.sample, visit.resolution) for visit in visits)

    def used(self, steps: int) -> Iterable[tuple[Sample, Resolution]]:
        """Returns each sample and each resolution at which a run of this many steps may need it.

        With one resolution these are all samples, with several only what the steps visit.
        """
        if len(self.transform.resolutions) > 1:
            return list(self.counts(steps))
        return [(sample, self.transform.resolutions[0]) for sample in (*self.training, *self.regularization)]

    @property
    def _share(self) -> Fraction:
        return self.settings.regularization.visit_share

    def _regularization_count(self, visits: int) -> int:
        """Returns how many of the first visits are of regularization images: in each batch, as many as in any other,
        if the batch size allows it.
        """
        return int(visits * self._share)

    def _sample(self, samples: Sequence[Sample], position: int, purpose: str) -> Sample:
        epoch, index = divmod(position, len(samples))
        return samples[_permutation(self.seed, purpose, epoch, len(samples))[index]]


@lru_cache(maxsize=4)
def _permutation(seed: int, purpose: str, epoch: int, sample_count: int) -> np.ndarray:
    return generator(seed, purpose, epoch).permutation(sample_count)
