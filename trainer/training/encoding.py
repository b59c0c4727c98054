"""Fills the cache: in this process, or in several that each load the encoders and take a share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from trainer.cache.store import Cache, Entry, Outcome, count_outcomes
from trainer.config.rules import open_device
from trainer.config.schema import Run
from trainer.core.console import refresh_interval
from trainer.core.errors import StorageError, TrainerError
from trainer.core.lock import Lock
from trainer.core.signals import reset_worker_signals
from trainer.dataset.transform import TransformedSample
from trainer.training.data import MASK, TrainingData, pixels_a_latent

if TYPE_CHECKING:
    import torch


def encode(run: Run, material: TrainingData, wanted: list[TransformedSample]) -> dict[str, int]:
    """Fill the cache with what it lacks; how many entries of each part were made. The encoders are gone when this returns."""
    from tqdm import tqdm

    cache = material.cache
    missing = cache.missing(wanted)
    # One at a time: a second process would make the same entries, so it waits and finds them there.
    with Lock(cache.root / "filling", wait=True) if missing else nullcontext():
        missing = missing and cache.missing(wanted)
        outcomes = (
            _in_processes(run, cache, missing)
            if run.cache.workers > 1 and len(missing) > 1
            else _here(run, cache, missing)
        )
        # Closed whatever happens: processes must not outlive what they work for.
        with (
            closing(outcomes),
            tqdm(
                outcomes, total=len(missing), desc="encoding", unit="entry", mininterval=refresh_interval(), disable=not missing
            ) as bar,
        ):
            return count_outcomes(cache.recipes, bar)


def _here(run: Run, cache: Cache, missing: Iterable[Entry]) -> Iterator[Outcome]:
    device = open_device(run)
    yield from cache.encode_missing(missing, _maker(run, device))
    if device.type == "cuda":
        import torch

        # What the encoders took is free for the denoiser, not only for other tensors of the same size.
        torch.cuda.empty_cache()


def _maker(run: Run, device: torch.device) -> Callable[[str, TransformedSample], torch.Tensor]:
    # Loads nothing before it is first used.
    encoder = run.model.build_encoder(device)

    def make(part: str, view: TransformedSample) -> torch.Tensor:
        return _mask(view, pixels_a_latent(run)) if part == MASK else encoder.encode(part, view)

    return make


def _mask(view: TransformedSample, pixels: int) -> torch.Tensor:
    """The edit mask of a sample at its latents' size, (1, h, w) in [0, 1]; all ones where it has none."""
    import torch

    if view.sample.mask is None:
        return torch.ones(1, view.height // pixels, view.width // pixels)
    grey = torch.from_numpy(view.pixels(MASK)).float().mean(2) / 255
    return torch.nn.functional.avg_pool2d(grey[None], pixels)


def _in_processes(run: Run, cache: Cache, missing: Sequence[Entry]) -> Iterator[Outcome]:
    """The outcomes of all entries, in the order in which they are made. Raises errors.StorageError where a process dies."""
    import torch

    # Not forked, for libraries that hold threads or a device do not survive it.
    context = multiprocessing.get_context("spawn")
    processes, readers = [], {}
    try:
        for number in range(min(run.cache.workers, len(missing))):
            reader, writer = context.Pipe(duplex=False)
            share = missing[number :: run.cache.workers]
            # As many threads as here, for another number gives other last bits.
            process = context.Process(
                target=_work, args=(run, cache, share, writer, torch.get_num_threads()), daemon=True
            )
            process.start()
            writer.close()
            processes.append(process)
            readers[reader] = process
        while readers:
            for reader in wait(list(readers)):
                outcome = _received(reader, readers[reader])
                if outcome is None:
                    del readers[reader]
                elif isinstance(outcome, TrainerError):
                    raise outcome
                else:
                    yield outcome
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _received(reader: Connection, process: multiprocessing.process.BaseProcess) -> Outcome | TrainerError | None:
    """What a process has to say; None where it has done its share."""
    try:
        return reader.recv()
    except EOFError:
        process.join()
        raise StorageError(
            f"A process that fills the cache died (exit code {process.exitcode}); what it had made is kept. The same command goes on from there; "
            "cache.workers=1 encodes in the main process."
        ) from None


def _work(run: Run, cache: Cache, share: Sequence[Entry], writer: Connection, threads: int) -> None:
    """The life of a process: its share of the entries, an outcome each, at last None."""
    import torch

    reset_worker_signals()
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    try:
        for outcome in _here(run, cache, share):
            writer.send(outcome)
            if not parent.is_alive():
                return
        writer.send(None)
    except TrainerError as error:
        writer.send(error)
