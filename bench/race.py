"""Training loops that take turns in one process, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

from trainer import run
from trainer.cache.store import Cache
from trainer.config import command_line
from trainer.config.compose import compose_config, to_run
from trainer.config.rules import open_device
from trainer.core.signals import Signals
from trainer.distributed.processes import Processes
from trainer.tracking.mlflow_run import RemoteRun
from trainer.training import run_folder
from trainer.training.data import prepare
from trainer.training.loop import Step, TrainingLoop

Lap = Callable[[], None]
WARM_UP = 2
"""Turns that do not count: libraries set themselves up, and MLflow's store is made."""


class Turn(NamedTuple):
    """What a turn took: seconds of the clock, and of this process's processors, which those of other programs do not lengthen."""

    clock: float
    processor: float


class Over(BaseException):
    """Unwinds a contender that has run its turns."""


def race(
    contenders: dict[str, Callable[[Lap], Any]], steps: int, turns: int, gated: str | None = None
) -> dict[str, list[Turn]]:
    """What each turn of `steps` steps took. Each contender calls its `Lap` after every step; while one runs the others wait.

    `gated` names the one that MLflow follows: MLflow's thread works in its turns only, and what it has begun is finished on its time.
    """
    names, found = list(contenders), {name: [] for name in contenders}
    baton, holder, failed = threading.Condition(), names[0], []

    def compete(name: str) -> None:
        done, began = 0, Turn(0, 0)

        def take() -> None:
            nonlocal began
            with baton:
                baton.wait_for(lambda: holder == name or failed)
            if failed:
                raise Over
            if name == gated and _gate.locked():
                _gate.release()
            began = Turn(time.perf_counter(), time.process_time())

        def hand_on() -> None:
            nonlocal holder
            with baton:
                holder = names[(names.index(name) + 1) % len(names)]
                baton.notify_all()

        def lap() -> None:
            nonlocal done
            done += 1
            if done % steps:
                return
            if name == gated:
                _gate.acquire()
            found[name].append(Turn(time.perf_counter() - began.clock, time.process_time() - began.processor))
            if done == steps * (turns + WARM_UP):
                raise Over
            hand_on()
            take()

        try:
            take()
            contenders[name](lap)
        except Over:
            pass
        except BaseException as error:
            failed.append(error)
        finally:
            if name == gated and _gate.locked():
                _gate.release()
            hand_on()

    threads = [threading.Thread(target=compete, args=(name,), name=name) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return {name: turns[WARM_UP:] for name, turns in found.items()}


def ratios(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios of turns that were neighbours in time."""
    return tuple(quantiles([a / b for a, b in zip(over, under, strict=True)], n=4))


def trainer(overrides: list[str], held: bool = True) -> Callable[[Lap], Any]:
    """The program with these settings as a contender; not `held`: cached tensors are read from their files at every use."""
    asked = command_line.parse(overrides)
    settings = to_run(compose_config(asked.overrides, asked.config_dir), asked.overrides, run_folder.find)

    def compete(lap: Lap) -> None:
        material = prepare(settings)
        if not held:
            material = replace(material, cache=Cache(material.cache.root, material.cache.recipes, memory=0))
        signals = Signals()
        with fitting(lap, threading.get_ident()), Processes(signals, lambda: open_device(settings)) as processes:
            run.train(settings, material, signals, processes, asked.overrides)

    return compete


_laps: dict[int, Lap] = {}
_gate = threading.Lock()
"""Held by MLflow's thread while it works, and by the contender it follows while others run."""
_steps, _send = TrainingLoop.steps, RemoteRun.send


@contextlib.contextmanager
def fitting(lap: Lap, thread: int) -> Iterator[None]:
    """In this block `lap` is called after every step of the program in this thread, when all that belongs to the step is done."""
    _laps[thread] = lap
    try:
        yield
    finally:
        del _laps[thread]


def _steps_with_laps(loop: TrainingLoop, batches: Any) -> Iterator[Step]:
    for step in _steps(loop, batches):
        yield step
        # Not every run in a process that has imported this is a contender.
        if lap := _laps.get(threading.get_ident()):
            lap()


TrainingLoop.steps = _steps_with_laps


def _send_in_turn(remote: RemoteRun, path: Path) -> Iterator[int]:
    answers = _send(remote, path)
    while True:
        with _gate:
            answer = next(answers, None)
        if answer is None:
            return
        yield answer


RemoteRun.send = _send_in_turn
