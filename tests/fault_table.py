"""The table of faults that the program must survive, and what the trials share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from program import Harness, Result, at_call, raise_signal, single_run

Trial = Callable[[Harness, Path, int], None]
"""Causes a fault in a run in the folder `out` and checks the result. The number, from 0, selects a moment or variant.
"""


@dataclass(frozen=True, slots=True)
class Fault:
    number: str
    """Number in the project's list of faults."""
    what: str
    trial: Trial
    count: int
    """Number of trials."""
    in_make_test: list[int]
    """The trials that `make test` runs; `make faults` runs all."""


FAULTS: list[Fault] = []


def fault(number: str, what: str, count: int, in_make_test: list[int] | None = None) -> Callable[[Trial], Trial]:
    """Adds a trial to the table. Without `in_make_test`, `make test` runs all trials."""

    def add(trial: Trial) -> Trial:
        selected = list(range(count)) if in_make_test is None else in_make_test
        FAULTS.append(Fault(number, what, trial, count, selected))
        return trial

    return add


# Functions for `at_call`: each forward pass, each example that is read, each tensor file that is written.
FORWARD = "trainer.training.predictor:Predictor.losses"
READ = "trainer.training.batches:Batches.example"
SAVE = "trainer.core.tensor_files:save_tensors"

ONE_BY_ONE = "hardware.micro_batch=1"
AVERAGE = "ema=0.9"
GIB = 2**30


def stop_run(harness: Harness, out: Path, forward: int, *settings: str, number: int = signal.SIGKILL) -> Path:
    """Runs the program until just before the forward pass of this number (from 1). Returns the run folder."""
    result = harness.run(out, *settings, setup=at_call(FORWARD, forward, raise_signal(number)))
    assert result.code == (-number if number == signal.SIGKILL else 128 + number), result
    return single_run(out)


def assert_continues(harness: Harness, out: Path, *settings: str) -> Result:
    """Asserts that the same command finishes the run, with the same bits as an uninterrupted run."""
    result = harness.run(out, *settings)
    assert result.code == 0, result
    harness.assert_equals_reference(single_run(out), *settings)
    return result
