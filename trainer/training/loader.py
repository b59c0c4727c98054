"""Reads the batches of a run ahead, in this process or in worker processes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.core.errors import StorageError, TrainerError
from trainer.core.signals import in_main_thread, reset_worker_signals

if TYPE_CHECKING:
    from trainer.core.batch import Batch
    from trainer.training.batches import Batches

STALL_TIMEOUT = 600
"""Seconds without an item after which the workers are considered stuck."""
POLL_INTERVAL = 2
"""Seconds between two checks that the workers are alive, while waiting for an item."""


def load_batches(
    batches: Batches,
    start: int,
    stop: int,
    workers: int,
    uninterrupted: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[int, list[Batch]]]:
    """Yields the batches of the steps `start` + 1 .. `stop`, read ahead by `workers` processes (0: by this process).

    Signals wait inside `uninterrupted`: an exception raised while workers are forked or stopped would be lost in a hook
    of `logging` or in a destructor. Raises errors.StorageError if a worker dies or hangs.
    """
    from torch.utils.data import DataLoader

    previous_handler = signal.getsignal(signal.SIGCHLD)
    items_of_steps: Any = _ErrorsAsItems(batches)
    loader = DataLoader(
        items_of_steps,
        batch_size=None,
        sampler=range(start + 1, stop + 1),
        num_workers=workers,
        worker_init_fn=_start_worker,
        timeout=POLL_INTERVAL if workers else 0,
        collate_fn=_identity,
    )
    with uninterrupted():
        items = iter(loader)
        if workers and in_main_thread():
            # When a worker dies, torch's handler raises wherever this process is, even in the middle of an update.
            # Without it, the death is noticed when the next item is requested.
            signal.signal(signal.SIGCHLD, previous_handler or signal.SIG_DFL)
    try:
        for step in range(start + 1, stop + 1):
            item = _next_item(items, step, batches)
            if isinstance(item, TrainerError):
                raise item
            yield item
    finally:
        with uninterrupted():
            # Stops the workers. Python ignores an exception that a signal raises in a destructor.
            del items


def _next_item(items: Iterator[Any], step: int, batches: Batches) -> Any:
    start = time.monotonic()
    while True:
        try:
            return next(items)
        except RuntimeError as error:
            reason = str(error)
            if not reason.startswith(("DataLoader timed out", "DataLoader worker (pid")):
                raise
        if not reason.startswith("DataLoader timed out"):
            break
        if time.monotonic() - start > STALL_TIMEOUT:
            reason = f"no batch arrived for {STALL_TIMEOUT} seconds"
            break
    # SIGKILL, since a hanging worker does not react to SIGTERM and would keep this process from ending.
    for worker in multiprocessing.active_children():
        worker.kill()
    raise StorageError(
        f"A loader worker died or hung while it read step {step} "
        f"(samples {', '.join(batches.local_sample_ids(step)[:8])}): {reason}. "
        "The same command continues from the last checkpoint; hardware.workers=0 loads in the main process."
    )


@dataclass(slots=True)
class _ErrorsAsItems:
    """The batches, with errors returned as items: torch would wrap an exception of a worker in its traceback."""

    batches: Batches

    def __getitem__(self, step: int) -> tuple[int, list[Batch]] | TrainerError:
        try:
            return self.batches[step]
        except TrainerError as error:
            return error


def _start_worker(worker: int) -> None:
    import torch

    reset_worker_signals()
    sys.excepthook = _ignore_broken_connections
    torch.set_num_threads(1)


def _ignore_broken_connections(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Replaces `sys.excepthook` in workers.

    A thread of `multiprocessing` hands the tensors over. If the main process stops during a transfer, that thread would
    print a traceback.
    """
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _identity(item: object) -> object:
    return item
