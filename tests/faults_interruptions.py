"""Interruptions at every moment, resumed bit-exactly, and failing members of a sweep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_table import AVERAGE, FORWARD, ONE_BY_ONE, SAVE, assert_continues, fault, stop_run
from program import (
    DEMO,
    SCHEDULE,
    TIMEOUT,
    Harness,
    Result,
    at_call,
    fingerprint,
    last_logged_step,
    losses,
    newest_checkpoint,
    raise_signal,
    run_all,
    scale_timeout,
    session_processes,
    single_run,
    start_module,
)

from trainer.core import rng
from trainer.training.visits import Visit


@fault("F10", "stopped before every forward pass of two epochs, within accumulation groups too", 40, [12, 27])
def stop_at_every_step(harness: Harness, out: Path, trial: int) -> None:
    stop_run(harness, out, 1 + trial // 2, ONE_BY_ONE, number=(signal.SIGKILL, signal.SIGTERM)[trial % 2])
    assert_continues(harness, out, ONE_BY_ONE)


@fault("F11", "the samples that are read, over several attempts", 2, [])
def samples_over_attempts(harness: Harness, out: Path, trial: int) -> None:
    def record_visits() -> None:
        from trainer.training.batches import Batches

        example = Batches.example

        def recorded_example(self: Batches, visit: Visit) -> dict:
            with (out / "visits.jsonl").open("a") as file:
                file.write(json.dumps([visit.number, visit.sample.id]) + "\n")
            return example(self, visit)

        Batches.example = recorded_example

    settings = [f"hardware.workers={2 * trial}"]
    for forward in (3, 2):
        stop = at_call(FORWARD, forward, raise_signal(signal.SIGTERM))
        harness.run(out, *settings, setup=run_all(record_visits, stop))
    harness.finish(out, *settings, setup=record_visits)
    records = [json.loads(line) for line in (out / "visits.jsonl").read_text().splitlines()]
    sample_ids = dict(records)
    assert all(sample_ids[visit] == id for visit, id in records), "a visit has the same sample in every attempt"
    assert sorted(sample_ids) == list(range(20))
    for epoch in (0, 1):
        assert len({sample_ids[visit] for visit in range(10 * epoch, 10 * epoch + 10)}) == 10


@fault("F12", "stopped five times in a row", 1, [])
def stop_five_times(harness: Harness, out: Path, trial: int) -> None:
    for step in range(1, 5):
        folder = stop_run(harness, out, 2, number=signal.SIGTERM)
        assert newest_checkpoint(folder).step == last_logged_step(folder) == step
    stop = at_call("trainer.export.write:export_after_training", 1, raise_signal(signal.SIGTERM))
    assert harness.run(out, setup=stop).code == 143
    assert_continues(harness, out)


@fault("F12", "other numbers of loader workers and evaluations change no bit", 4, [])
def settings_without_effect(harness: Harness, out: Path, trial: int) -> None:
    setting = ("hardware.workers=2", "evaluation.every=1", "evaluation.every=1000", "hardware.workers=1")[trial]
    folder = harness.finish(out, setting)
    assert fingerprint(folder, state=False) == fingerprint(harness.reference(), state=False)
    assert train_losses(folder) == train_losses(harness.reference())


@fault("F12", "micro-batches of one batch; five samples in twos", 3, [2])
def micro_batches(harness: Harness, out: Path, trial: int) -> None:
    size, batch = ((1, 4), (2, 4), (2, 5))[trial]
    folder = harness.finish(out, f"hardware.micro_batch={size}", f"batch={batch}")
    assert train_losses(folder) == pytest.approx(train_losses(harness.reference(f"batch={batch}")), abs=1e-6)


def train_losses(folder: Path) -> dict[int, float]:
    return {step: loss for step, name, loss in losses(folder) if name == "train/loss"}


# (function, number of the call, whether after the call instead of before it)
MOMENTS = [
    ("trainer.training.data:split_samples", 1, False),
    ("trainer.cache.store:Cache.put", 7, False),
    ("trainer.training.session:build_network", 1, True),
    ("trainer.training.evaluator:held_out_loss", 1, False),
    ("trainer.training.evaluator:held_out_loss", 2, True),
    ("trainer.training.evaluator:held_out_loss", 4, True),
    ("trainer.training.progress:Progress.advance", 3, False),
    ("trainer.dataset.image_grid:save_png", 5, False),
    ("torch.optim:AdamW.step", 1, False),
    ("torch.optim:AdamW.step", 4, True),
    ("trainer.tracking.journal:Journal.log_metrics", 4, False),
    (SAVE, 1, False),
    (SAVE, 4, True),
    ("trainer.training.checkpoint:Checkpoints._retain", 2, False),
    ("trainer.training.session:Session._finish", 1, False),
    ("trainer.tracking.curves:write_summary", 1, False),
]


@fault("F13", "SIGTERM and Ctrl-C at every kind of moment", 2 * len(MOMENTS), [10, 13, 14])
def signal_at_moment(harness: Harness, out: Path, trial: int) -> None:
    number = (signal.SIGTERM, signal.SIGINT)[trial % 2]
    where, call, after = MOMENTS[trial // 2]
    # An empty cache, so that there is something to encode; an average, which replaces the weights while it is
    # evaluated.
    settings = [f"cache.path={out}/cache", AVERAGE]
    reached = out / "reached"
    setup = at_call(where, call, run_all(reached.touch, raise_signal(number)), after)
    result = harness.run(out, *settings, setup=setup)
    assert reached.exists(), f"{where} is not called from this module"
    assert_stops(harness, out, result, number, AVERAGE)


@fault("F13", "SIGTERM and Ctrl-C at a random moment, also to the loader workers", 30, [11])
def signal_at_random(harness: Harness, out: Path, trial: int) -> None:
    settings = ["hardware.workers=2"]
    number = (signal.SIGTERM, signal.SIGINT)[trial % 2]
    run = harness.start(out, *settings)
    delay = harness.seconds(*settings) / 30 * (trial + rng.uniform("stop", trial))
    time.sleep(delay)
    run.signal_all(number)
    result = run.wait()
    result.seconds -= delay
    assert_stops(harness, out, result, number, *settings)
    assert session_processes(run.pid) == []


def assert_stops(harness: Harness, out: Path, result: Result, number: int, *settings: str) -> None:
    """Asserts that a signal stopped the program in time and that the same command then finishes the run."""
    # Before the program has started and after it has ended, Python's own signal handlers are active.
    has_ended = "training_curves.png" in result.output
    assert (
        result.code == 128 + number
        or (has_ended and result.code in (0, -number))
        or (not result.output and result.code == -number)
    ), result
    assert result.seconds < scale_timeout(5)
    assert "Traceback" not in result.output
    if list(out.glob("*/journal.jsonl")) and last_logged_step(single_run(out)):
        assert newest_checkpoint(single_run(out)).step == last_logged_step(single_run(out))
    assert_continues(harness, out, *settings)


@fault("F13", "a signal while the program imports its modules", 4, [])
def signal_while_importing(harness: Harness, out: Path, trial: int) -> None:
    with start_module([*harness.settings, f"out={out}"]) as run:
        time.sleep(0.2 + 0.7 * trial)
        run.send_signal(signal.SIGTERM)
        start_time = time.monotonic()
        output = run.communicate(timeout=20)[1]
        # Before the first line of the program, Python ends as any program does; to a shell, both codes are 143.
        assert run.returncode in (143, -signal.SIGTERM) and "Error" not in output, output
        assert time.monotonic() - start_time < 5


WATCH_IMPORTS = """
import os, signal, sys, threading, time
from trainer.__main__ import main
folder, chosen = sys.argv[1:3]
class Watch:
    def find_spec(module, path=None, target=None):
        if threading.current_thread() is threading.main_thread():
            with open(folder + "/imports", "a") as file:
                print(module, file=file)
            if module == chosen:
                sys.meta_path.remove(Watch)
                with open(folder + "/signaled", "w") as file:
                    print(time.monotonic(), file=file)
                os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Watch)
sys.exit(main(sys.argv[3:]))
"""
"""A program that writes down each module before it imports it, and receives SIGTERM before the chosen one."""
SPREAD, LAST = 60, 20
"""Numbers of modules: from all over a run, and from its end, when the curves are drawn."""


def run_watched(harness: Harness, out: Path, chosen: str) -> subprocess.CompletedProcess[str]:
    """Runs the program in a new interpreter, which has imported nothing."""
    arguments = [*harness.settings, *DEMO, *SCHEDULE, f"out={out}/runs"]
    command = [sys.executable, "-c", WATCH_IMPORTS, str(out), chosen, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=scale_timeout(TIMEOUT))


@fault("F36", "SIGTERM in the import of a module, until after the end of training", 1 + SPREAD + LAST, [0])
def signal_in_import(harness: Harness, out: Path, trial: int) -> None:
    def list_imports(folder: Path) -> Path:
        assert run_watched(harness, folder, "").returncode == 0
        return folder / "imports"

    if trial == 0:
        chosen = "matplotlib.axes"
    else:
        modules = list(dict.fromkeys(harness.template("imports", list_imports).read_text().splitlines()))
        numbers = [i * len(modules) // SPREAD for i in range(SPREAD)] + list(range(-20 * LAST, 0, 20))
        chosen = modules[numbers[trial - 1]]
    done = run_watched(harness, out, chosen)
    assert done.returncode == 143 and "Traceback" not in done.stderr, (chosen, done)
    assert time.monotonic() - float((out / "signaled").read_text()) < scale_timeout(5), (chosen, done)
    assert_continues(harness, out / "runs")


@fault("F13", "a second signal", 2, [1])
def second_signal(harness: Harness, out: Path, trial: int) -> None:
    numbers = [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)][trial]
    setup = run_all(at_call(FORWARD, 4, raise_signal(numbers[0])), at_call(SAVE, 4, raise_signal(numbers[1])))
    result = harness.run(out, setup=setup)
    assert result.code == 128 + numbers[1]
    assert newest_checkpoint(single_run(out)).step == 2, "the second signal ends the save of step 3"
    assert_continues(harness, out)


@fault("F14", "SIGTERM during the second of four jobs: in one process, or as members with their own processes", 2, [])
def stop_sweep(harness: Harness, out: Path, trial: int) -> None:
    if trial == 0:
        sweep = ["-m", "seed=1,2,3,4", "hydra/launcher=basic"]
        result = harness.run(out, *sweep, setup=at_call(FORWARD, 8, raise_signal(signal.SIGTERM)))
    else:
        sweep = ["-m", "seed=1,2,3,4", "hydra.launcher.slots=1"]
        run = harness.start(out, *sweep)
        wait_for_second_member(out)
        run.signal(signal.SIGTERM)
        result = run.wait()
    assert result.code == 143 and "Traceback" not in result.output, result
    finished = {
        path: path.stat().st_mtime_ns
        for path in out.glob("*/summary.json")
        if json.loads(path.read_text())["status"] == "finished"
    }
    assert len(finished) == 1 and len(list(out.glob("*/run.json"))) == 2
    result = harness.run(out, *sweep)
    assert result.code == 0, result
    assert len(list(out.glob("*/export"))) == 4
    assert [path.stat().st_mtime_ns for path in finished] == list(finished.values())


def wait_for_second_member(out: Path) -> int:
    """Waits until the second member of a sweep has started training. Returns its process id."""
    deadline = time.monotonic() + scale_timeout(60)
    while time.monotonic() < deadline:
        journals = list(out.glob("*/journal.jsonl"))
        running = [path.parent for path in journals if not (path.parent / "summary.json").exists()]
        if running and len(journals) == 2:
            return int((running[0] / "lock").read_text().split()[1])
        time.sleep(0.005)
    raise TimeoutError("the second member does not start")


@fault("F28", "the second of three members fails, aborts or is killed; then the same sweep again", 3, [])
def member_fails(harness: Harness, out: Path, trial: int) -> None:
    if trial == 0:
        sweep = ["-m", "optimizer.lr=1e-4,1e30,1e-3"]
        result = harness.run(out, *sweep)
    else:
        sweep = ["-m", "seed=1,2,3"]
        run = harness.start(out, *sweep)
        os.kill(wait_for_second_member(out), (signal.SIGABRT, signal.SIGKILL)[trial - 1])
        result = run.wait()
    (state,) = out.glob("sweeps/*/sweep.json")
    members = json.loads(state.read_text())["members"]
    assert result.code == 1 and [member["status"] for member in members] == ["finished", "failed", "finished"], result
    assert (state.parent / "ranking.md").exists() and members[1]["reason"] in result.output
    log = out / members[1]["folder"] / "log.txt" if trial == 0 else Path(members[1]["log"])
    assert ("Traceback", "Fatal Python error: Aborted", "")[trial] in log.read_text()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoints/*/MANIFEST")}
    result = harness.run(out, *sweep)
    assert result.code == (1 if trial == 0 else 0)
    members = json.loads(state.read_text())["members"]
    assert [member["status"] for member in members] == ["finished", "failed" if trial == 0 else "finished", "finished"]
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items())


@fault("F37", "the process of a sweep is killed, hung up, or stopped; then the same sweep again", 5, [])
def sweep_dies(harness: Harness, out: Path, trial: int) -> None:
    slots = (1, 2, 1, 1, 1)[trial]
    number = (signal.SIGKILL, signal.SIGKILL, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)[trial]
    sweep = ["-m", "seed=1,2,3", f"hydra.launcher.slots={slots}", "steps=12", "evaluation.every=12"]
    run = harness.start(out, *sweep)
    deadline = time.monotonic() + scale_timeout(60)
    while len(running := training_members(out)) < slots:
        assert time.monotonic() < deadline, "the members do not start"
        time.sleep(0.005)
    run.signal(number)
    if number in (signal.SIGTERM, signal.SIGINT):
        assert run.wait().code == 128 + number
    # The members may still be saving.
    result = harness.run(out, *sweep)
    assert result.code == 0 and "failed" not in result.output, result
    (state,) = out.glob("sweeps/*/sweep.json")
    assert [member["status"] for member in json.loads(state.read_text())["members"]] == ["finished"] * 3
    for folder in running:
        records = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
        kinds = [record["kind"] for record in records if record["kind"] in ("attempt", "stopped", "failed", "finished")]
        # A member may also have finished before it notices that the sweep has died.
        early = ["attempt", "finished"], ["attempt", "finished", "stopped"]
        assert kinds in (["attempt", "stopped", "attempt", "finished"], *early), kinds
    assert len(list(out.glob("*/run.json"))) == 3


def training_members(out: Path) -> list[Path]:
    """Returns the run folders in which a member has logged a step of training."""
    return [path.parent for path in out.glob("*/journal.jsonl") if '"train/loss"' in path.read_text()]
