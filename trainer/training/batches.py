"""From cached samples to the micro-batches of a step; what a step holds is a function of (seed, step) alone."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trainer.cache.store import Cache
from trainer.core.batch import Example, collate, group_by_shape
from trainer.core.errors import StorageError, TrainerError
from trainer.core.rng import generator, normal, uniform
from trainer.core.signals import reset_worker_signals

if TYPE_CHECKING:
    import numpy as np

    from trainer.dataset import Dataset
    from trainer.dataset.sample import Sample
    from trainer.dataset.transform import Transform, TransformedSample
    from trainer.model import Family

STALLED = 600
"""Seconds after which a silent loader worker counts as hanging."""
PATIENCE = 2
"""Seconds between two looks at whether the workers live, while one is waited for."""


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(count)


def visits(seed: int, step: int, batch: int, count: int) -> list[tuple[int, int]]:
    """(visit, sample index) of each place of the batch of a step (1, 2, ...).

    Visits are numbered through the run; each epoch of `count` visits holds every sample once, in an order of its own, and batches run
    across the border between two epochs.
    """
    first = (step - 1) * batch
    return [
        (visit, int(_permutation(seed, visit // count, count)[visit % count])) for visit in range(first, first + batch)
    ]


@dataclass(slots=True)
class Batches:
    """Step -> its micro-batches: the cached parts, `noise` of the latents' shape and the `time` of each sample, where asked for its `weight`
    in the loss. A micro-batch has one size of pictures.

    Of `count` processes the one of `rank` gets each `count`-th sample of a batch; perhaps one fewer than others, or none.
    """

    samples: list[Sample]
    cache: Cache
    family: Family
    settings: Dataset
    transform: Transform
    seed: int
    batch: int
    micro_batch: int
    rank: int = 0
    count: int = 1
    weighted: bool = False
    _shifts: dict[tuple[int, int], float] = field(default_factory=dict, init=False)

    def share(self, step: int) -> list[tuple[int, int]]:
        """(visit, sample index) of each place of this process's share of a step's batch."""
        return visits(self.seed, step, self.batch, len(self.samples))[self.rank :: self.count]

    def view(self, visit: int, index: int) -> TransformedSample:
        """The sample as it is seen at this visit: flipped or not, with its caption or without."""
        sample, settings = self.samples[index], self.settings
        return self.transform.apply(
            sample,
            flip=settings.flip and uniform(self.seed, "flip", visit, sample.id) < 0.5,
            drop_caption=uniform(self.seed, "caption dropout", visit, sample.id) < settings.caption_dropout,
            drop_control=uniform(self.seed, "control dropout", visit, sample.id) < settings.control_dropout,
        )

    def row(self, visit: int, index: int) -> Example:
        import torch

        view = self.view(visit, index)
        row = self.cache.example(view)
        name = view.sample.id
        shape = tuple(row["latents"].shape)
        if "latents_std" in row:
            row["latents"] = row["latents"] + row.pop("latents_std") * normal(
                shape, self.seed, "posterior", visit, name
            )
        if self.weighted:
            floor = self.settings.mask_floor
            mask = row.pop("mask", torch.ones(1, 1, 1))
            row["weight"] = view.sample.weight * (floor + (1 - floor) * mask).expand(1, *shape[1:])
        # Half a unit in the last place keeps the quantile off 0, where a normal distribution has no finite value.
        quantile = uniform(self.seed, "time", visit, name) + 2**-54
        row["noise"] = normal(shape, self.seed, "noise", visit, name)
        row["t"] = torch.tensor(self.family.objective.quantile_to_time(quantile, self._shift(*shape[1:])))
        return row

    def _shift(self, height: int, width: int) -> float:
        # A family works it out from its files.
        if (height, width) not in self._shifts:
            self._shifts[height, width] = self.family.time_shift(height, width)
        return self._shifts[height, width]

    def idle(self, step: int) -> Example:
        """A micro-batch that does not count, for a process that has nothing else to do while others have: one sample of the step's batch."""
        import torch

        row = self.row(*visits(self.seed, step, self.batch, len(self.samples))[0])
        return collate([row | {"loss_mask": torch.tensor(0.0)}])

    def ids(self, step: int) -> list[str]:
        """The samples of this process's share of a step's batch."""
        return [self.samples[index].id for _, index in self.share(step)]

    def of_all(self, step: int) -> list[str]:
        """The samples of a step's whole batch."""
        return [self.samples[index].id for _, index in visits(self.seed, step, self.batch, len(self.samples))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, step: int) -> tuple[int, list[Example]]:
        rows = [self.row(*visit) for visit in self.share(step)]
        return step, [collate([rows[i] for i in chunk]) for chunk in group_by_shape(rows, self.micro_batch)]


def load(batches: Batches, start: int, stop: int, workers: int) -> Iterator[tuple[int, list[Example]]]:
    """Steps `start` + 1 .. `stop`, read ahead by `workers` processes (0: in this one). Raises errors.StorageError where a worker dies or hangs."""
    from torch.utils.data import DataLoader

    before = signal.getsignal(signal.SIGCHLD)
    loader = DataLoader(
        _Told(batches),
        batch_size=None,
        sampler=range(start + 1, stop + 1),
        num_workers=workers,
        worker_init_fn=_start_worker,
        timeout=PATIENCE if workers else 0,
        collate_fn=_as_it_is,
    )
    items = iter(loader)
    if workers:
        # Torch raises of a dead worker wherever this process is, in the midst of an update too. Here it is noticed where its item is awaited.
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    for step in range(start + 1, stop + 1):
        item = _awaited(items, step, batches)
        if isinstance(item, TrainerError):
            raise item
        yield item


def _awaited(items: Iterator, step: int, batches: Batches) -> Any:
    began = time.monotonic()
    while True:
        try:
            return next(items)
        except RuntimeError as error:
            reason = str(error)
            if not reason.startswith(("DataLoader timed out", "DataLoader worker (pid")):
                raise
        if not reason.startswith("DataLoader timed out"):
            break
        if time.monotonic() - began > STALLED:
            reason = f"nothing came for {STALLED} seconds"
            break
    # One that hangs does not hear SIGTERM either, and would keep this process from ending.
    for worker in multiprocessing.active_children():
        worker.kill()
    raise StorageError(
        f"A process that loads data died or hung while reading step {step} (samples {', '.join(batches.ids(step)[:8])}): {reason}. "
        "The same command continues from the last checkpoint; hardware.workers=0 loads in the main process."
    )


@dataclass(slots=True)
class _Told:
    """Batches whose endings come as items: what a worker raises would reach the user wrapped in its traceback."""

    batches: Batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> tuple[int, list[Example]] | TrainerError:
        try:
            return self.batches[step]
        except TrainerError as ending:
            return ending


def _start_worker(worker: int) -> None:
    import torch

    reset_worker_signals()
    torch.set_num_threads(1)


def _as_it_is(item: object) -> object:
    return item
