"""`stage=train`: trains a run, or continues it from its last checkpoint."""

from __future__ import annotations

import logging
import shlex
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import yaml

from trainer.config.identity import to_plain
from trainer.config.rules import check_sharded, open_device
from trainer.config.schema import Run
from trainer.core import files
from trainer.core.console import print_line
from trainer.core.errors import LockedError, UsageError
from trainer.core.signals import Signals
from trainer.distributed.processes import Processes
from trainer.hardware import SMALL_NETWORK
from trainer.stages.data_report import describe_long_captions, describe_many_visits, describe_upscaling
from trainer.stages.results import TrainingResult
from trainer.sweep.members import is_member, parent_run_id, report_folder
from trainer.tracking.journal import Journal
from trainer.training.build import check_buildable
from trainer.training.checkpoint import CHECKPOINTS
from trainer.training.data import TrainingData, prepare, required_samples
from trainer.training.encoding import encode_missing
from trainer.training.out_of_memory import out_of_memory_errors
from trainer.training.recorder import Recorder
from trainer.training.run_folder import RunFolder, RunSummary, acquire_run_folder
from trainer.training.run_log import log_to_folder
from trainer.training.session import Session
from trainer.training.tracked_run import open_tracker, send_missing_records

log = logging.getLogger(__name__)

LOCK_POLL_SECONDS = 0.5
"""Seconds between two attempts of a member of a sweep to lock its run folder."""


def execute(run: Run, signals: Signals, overrides: list[str]) -> TrainingResult | None:
    """Trains in all processes of the run. Returns the result on the main process, None on the others."""
    processes = Processes(signals, lambda: open_device(run))
    if processes.sharded:
        check_sharded(run)
    with processes:
        data = processes.main_first(lambda: prepare(run))
        run.lr_scheduler.check(data.total_steps(run))
        return train(run, data, signals, processes, overrides)


def train(
    run: Run, data: TrainingData, signals: Signals, processes: Processes, overrides: list[str]
) -> TrainingResult | None:
    """Like `execute`, after the data has been read."""
    if processes.run_on_main(lambda: data.digests) != data.digests:
        raise UsageError("the processes see different data or weights; give all of them the same files")
    with ExitStack() as stack:
        recorder: Recorder | None = None
        folder: Path | None = None

        def start() -> bool:
            """Runs on the main process. Returns whether the run is finished already."""
            nonlocal recorder, folder
            run_folder = _acquire(stack, run, data)
            folder = run_folder.path
            report_folder(folder)
            if run_folder.finished:
                _show_finished(run, run_folder, overrides)
                return True
            check_buildable(run, is_new=not (run_folder.path / CHECKPOINTS).exists())
            open_device(run)  # a device that is missing is reported before anything is encoded
            journal = stack.enter_context(Journal(run_folder.path))
            stack.enter_context(log_to_folder(run_folder.path, journal))
            # `run.execute` does the same; here, journal and log get its message too.
            stack.enter_context(out_of_memory_errors(run))
            if not processes.sharded:
                _forecast(run, data, journal, processes.world_size)
            files.write(run_folder.path / "config.yaml", yaml.safe_dump(to_plain(run), sort_keys=False))
            journal.log_event("command", text=shlex.join(["python", "-m", "trainer", *overrides]))
            _fill_cache(run, data, run_folder)
            _show_data(run, data, journal)
            tracker = partial(open_tracker, run, run_folder, journal, overrides, parent_run_id())
            recorder = Recorder(run, run_folder, journal, tracker)
            return False

        if not processes.run_on_main(start):
            Session(run, data, recorder, signals, processes).train()
        return TrainingResult.read(folder) if folder else None


def _acquire(stack: ExitStack, run: Run, data: TrainingData) -> RunFolder:
    """Acquires the run folder. A member of a sweep waits for a process that trains the same run, others refuse."""
    is_waiting = False
    while True:
        try:
            return stack.enter_context(acquire_run_folder(run, data.digests))
        except LockedError as error:
            if not is_member():
                raise
            if not is_waiting:
                print_line(f"waiting: {error}")
            is_waiting = True
        time.sleep(LOCK_POLL_SECONDS)


def _show_finished(run: Run, run_folder: RunFolder, overrides: list[str]) -> None:
    """Says that there is nothing to do."""
    steps = RunSummary.read(run_folder.path).steps
    print_line(
        f"{run_folder.path} is finished ({steps} steps); nothing to do. "
        "Type fresh=true to run it again in a new folder."
    )
    send_missing_records(run, run_folder, overrides, parent_run_id())


def _forecast(run: Run, data: TrainingData, journal: Journal, world_size: int) -> None:
    """Prints a line about memory and time. Raises errors.UsageError if the run does not fit into memory.

    Small networks are left out: they fit, and the forecast would take longer than some of their steps.
    """
    from trainer.forecast.advice import check_fits
    from trainer.forecast.predict import try_forecast
    from trainer.forecast.table import summary

    if sum(parameter.numel() for parameter in run.model.meta_model().parameters()) <= SMALL_NETWORK:
        return
    assert run.batch is not None
    run = replace(run, batch=-(-run.batch // world_size))
    found = try_forecast(run, data, log.warning)
    if found is None:
        return
    journal.log_event("forecast", text=summary(found))
    print_line(f"forecast: {summary(found)}")
    check_fits(run, data, found)


def _fill_cache(run: Run, data: TrainingData, run_folder: RunFolder) -> None:
    samples = required_samples(run, data)
    data.cache.record_use(run_folder.path, samples)
    made = encode_missing(run, data, samples)
    counts = [f"{count} {name} made" for name, count in made.items() if count]
    print_line(f"cache: {', '.join(counts) or 'nothing to make'}")


def _show_data(run: Run, data: TrainingData, journal: Journal) -> None:
    """Prints what the user should know about the data, and records the samples that are left out."""
    if data.listing.faults:
        journal.log_event("left_out", faults=data.listing.faults)
        print_line(
            f"left out: {data.listing.count_faults(run.dataset.describe())}; the journal and stage=check list them"
        )
    samples = data.split.trained
    upscaling, long_captions = describe_upscaling(data, samples), describe_long_captions(run, samples)
    for note in (*data.listing.notes, *upscaling, *long_captions, *describe_many_visits(run, data)):
        print_line(f"note: {note}")
