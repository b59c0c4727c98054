"""Runs training loops in turns in one process, so that whatever slows down the machine affects all of them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from trainer.cache.store import Cache
from trainer.config import command_line
from trainer.config.compose import compose_config, to_run
from trainer.config.rules import open_device
from trainer.core.signals import Signals
from trainer.distributed.processes import Processes
from trainer.stages.train import train
from trainer.tracking.mlflow_run import RemoteRun
from trainer.training.data import prepare
from trainer.training.loop import Step, TrainingLoop
from trainer.training.run_folder import find_run_folder

Lap = Callable[[], None]
"""A contender calls its lap function after each training step."""
WARM_UP = 2
"""Turns that are not measured: libraries initialize themselves, and MLflow's database is created."""


class Turn(NamedTuple):
    """Duration of a turn in seconds, by the wall clock and in CPU time of this process.

    Other programs on the machine do not add to the CPU time.
    """

    seconds: float
    cpu_seconds: float


class RaceFinished(BaseException):
    """Ends a contender that has run all its turns."""


def race(
    contenders: dict[str, Callable[[Lap], Any]], steps: int, turns: int, tracked: str | None = None
) -> dict[str, list[Turn]]:
    """Measures turns of `steps` training steps each. While a contender runs, the others wait.

    `tracked` names the contender whose run MLflow follows. MLflow's thread works only during the turns of this
    contender, and an operation that it has begun is completed within the turn.
    """
    names = list(contenders)
    results: dict[str, list[Turn]] = {name: [] for name in contenders}
    baton, holder = threading.Condition(), names[0]
    errors: list[BaseException] = []

    def compete(name: str) -> None:
        laps, start = 0, Turn(0, 0)

        def take_baton() -> None:
            nonlocal start
            with baton:
                baton.wait_for(lambda: holder == name or errors)
            if errors:
                raise RaceFinished
            if name == tracked and _tracker_gate.locked():
                _tracker_gate.release()
            start = Turn(time.perf_counter(), time.process_time())

        def pass_baton() -> None:
            nonlocal holder
            with baton:
                holder = names[(names.index(name) + 1) % len(names)]
                baton.notify_all()

        def lap() -> None:
            nonlocal laps
            laps += 1
            if laps % steps:
                return
            if name == tracked:
                _tracker_gate.acquire()
            results[name].append(Turn(time.perf_counter() - start.seconds, time.process_time() - start.cpu_seconds))
            if laps == steps * (turns + WARM_UP):
                raise RaceFinished
            pass_baton()
            take_baton()

        try:
            take_baton()
            contenders[name](lap)
        except RaceFinished:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            if name == tracked and _tracker_gate.locked():
                _tracker_gate.release()
            pass_baton()

    threads = [threading.Thread(target=compete, args=(name,), name=name) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {name: measured[WARM_UP:] for name, measured in results.items()}


def trainer(overrides: list[str], cache_in_memory: bool = True) -> Callable[[Lap], Any]:
    """Returns a contender that trains with these settings.

    Without `cache_in_memory` it reads cached tensors from their files each time they are used.
    """
    arguments = command_line.parse(overrides)
    settings = to_run(compose_config(arguments.overrides, arguments.config_dir), arguments.overrides, find_run_folder)

    def compete(lap: Lap) -> None:
        data = prepare(settings)
        if not cache_in_memory:
            data = replace(data, cache=Cache(data.cache.root, data.cache.recipes, memory=0))
        signals = Signals()
        with count_laps(lap), Processes(signals, lambda: open_device(settings)) as processes:
            train(settings, data, signals, processes, arguments.overrides)

    return compete


_laps: dict[int, Lap] = {}
"""ID of a thread -> lap function of the contender that runs in it."""
_tracker_gate = threading.Lock()
"""Held by MLflow's thread while it works, and by the tracked contender while others run."""
_steps, _send = TrainingLoop.steps, RemoteRun.send


@contextlib.contextmanager
def count_laps(lap: Lap) -> Iterator[None]:
    """Calls `lap` after each step of a run in this thread, when everything that belongs to the step is done."""
    thread = threading.get_ident()
    _laps[thread] = lap
    try:
        yield
    finally:
        del _laps[thread]


def _steps_with_laps(loop: TrainingLoop, batches: Any) -> Iterator[Step]:
    for step in _steps(loop, batches):
        yield step
        # Runs in this process that do not compete have no lap function.
        if lap := _laps.get(threading.get_ident()):
            lap()


TrainingLoop.steps = _steps_with_laps


def _send_in_turn(remote: RemoteRun, path: Path) -> Iterator[int]:
    answers = _send(remote, path)
    while True:
        with _tracker_gate:
            answer = next(answers, None)
        if answer is None:
            return
        yield answer


RemoteRun.send = _send_in_turn
