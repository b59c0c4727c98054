"""Fills the cache, in this process or in several worker processes that each load the encoders."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, nullcontext
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from trainer.cache.store import FILLING, Cache, Entry, Outcome, count_outcomes
from trainer.config.rules import open_device
from trainer.config.schema import Run
from trainer.core.bars import ProgressBar
from trainer.core.errors import StorageError, TrainerError
from trainer.core.signals import reset_worker_signals
from trainer.dataset.transform import TransformedSample
from trainer.training.data import MASK, TrainingData, pixels_per_latent

if TYPE_CHECKING:
    import torch


def encode_missing(run: Run, data: TrainingData, samples: list[TransformedSample]) -> dict[str, int]:
    """Creates the cache entries that the samples lack, and frees the encoders.

    Returns how many entries of each tensor were made.
    """
    cache = data.cache
    missing = cache.missing(samples)
    # One process fills a cache at a time. The next one waits here and then finds the entries.
    with cache.lock(FILLING) if missing else nullcontext():
        missing = missing and cache.missing(samples)
        if run.cache.workers > 1 and len(missing) > 1:
            outcomes = _encode_in_workers(run, cache, missing)
        else:
            outcomes = _encode(run, cache, missing)
        progress = ProgressBar(
            outcomes,
            total=len(missing),
            desc="encoding",
            unit="entry",
            disable=not missing,
        )
        # Closed in any case, so that no worker process outlives this one.
        with closing(outcomes), progress:
            return count_outcomes(cache.recipes, progress)


def _encode(run: Run, cache: Cache, missing: Iterable[Entry]) -> Generator[Outcome]:
    device = open_device(run)
    yield from cache.encode_missing(missing, _entry_encoder(run, device))
    if device.type == "cuda":
        import torch

        # Return the memory of the encoders to the device: torch would only reuse it for tensors of similar sizes.
        torch.cuda.empty_cache()


def _entry_encoder(run: Run, device: torch.device) -> Callable[[str, TransformedSample], torch.Tensor]:
    """Returns the function that computes a tensor of a sample."""
    # Loads no weights until it is first used.
    encoder = run.model.build_encoder(device)

    def encode(name: str, sample: TransformedSample) -> torch.Tensor:
        return _encode_mask(sample, pixels_per_latent(run)) if name == MASK else encoder.encode(name, sample)

    return encode


def _encode_mask(sample: TransformedSample, pixels: int) -> torch.Tensor:
    """Returns the edit mask of a sample at the size of its latents, (1, h, w) in [0, 1]; ones if it has no mask."""
    import torch

    if sample.sample.mask is None:
        return torch.ones(1, sample.height // pixels, sample.width // pixels)
    gray = torch.from_numpy(sample.pixels(MASK)).float().mean(2) / 255
    return torch.nn.functional.avg_pool2d(gray[None], pixels)


def _encode_in_workers(run: Run, cache: Cache, missing: Sequence[Entry]) -> Generator[Outcome]:
    """Encodes in `cache.workers` processes and yields the outcomes as they arrive.

    Raises errors.StorageError if a worker dies.
    """
    import torch

    # Libraries that use threads or a device do not survive a fork.
    context = multiprocessing.get_context("spawn")
    workers: list[multiprocessing.process.BaseProcess] = []
    readers: dict[Connection, multiprocessing.process.BaseProcess] = {}
    try:
        for number in range(min(run.cache.workers, len(missing))):
            reader, writer = context.Pipe(duplex=False)
            share = missing[number :: run.cache.workers]
            # As many threads as in this process: the last bits of a result depend on the number of threads.
            arguments = (run, cache, share, writer, torch.get_num_threads())
            worker = context.Process(target=_run_worker, args=arguments, daemon=True)
            worker.start()
            writer.close()
            workers.append(worker)
            readers[reader] = worker
        while readers:
            for ready in wait(list(readers)):
                assert isinstance(ready, Connection)
                outcome = _receive(ready, readers[ready])
                if outcome is None:
                    del readers[ready]
                elif isinstance(outcome, TrainerError):
                    raise outcome
                else:
                    yield outcome
    finally:
        for process in workers:
            process.terminate()
        for process in workers:
            process.join()


def _receive(reader: Connection, process: multiprocessing.process.BaseProcess) -> Outcome | TrainerError | None:
    """Returns the next message of a worker; None if it has finished its share."""
    try:
        return reader.recv()
    except EOFError:
        process.join()
        raise StorageError(
            f"A worker that fills the cache died (exit code {process.exitcode}); the entries it made are kept. "
            "The same command continues from there; cache.workers=1 encodes in the main process."
        ) from None


def _run_worker(run: Run, cache: Cache, share: Sequence[Entry], writer: Connection, threads: int) -> None:
    """Main function of a worker: sends the outcome of each entry, then None."""
    import torch

    reset_worker_signals()
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None
    try:
        for outcome in _encode(run, cache, share):
            writer.send(outcome)
            if not parent.is_alive():
                return
        writer.send(None)
    except TrainerError as error:
        writer.send(error)
