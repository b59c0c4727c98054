"""What the program must survive, one table for all: a few trials of each in `make test`, all of them in `make faults`.

The numbers are those of the project's list of faults. REF is the same run, uninterrupted; H is the fingerprint of its last checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from program import (
    Action,
    Ended,
    Lab,
    all_of,
    at,
    at_leisure,
    checkpoint,
    command,
    copied,
    digest,
    dying_within,
    fingerprint,
    last_step,
    losses,
    only_run,
    processes,
    records,
    to_itself,
    tree,
)
from safetensors.torch import load_file, save_file

from trainer.core import rng
from trainer.training.checkpoint import Checkpoints
from trainer.training.checkpoint_format import EMA, MANIFEST, OPTIMIZER, STATE, WEIGHTS

Trial = Callable[[Lab, Path, int], None]
"""Does one thing to a run under the folder `out`; the number, from 0, says which moment or variant."""


@dataclass(frozen=True, slots=True)
class Fault:
    number: str
    what: str
    trial: Trial
    count: int
    short: list[int]
    """The trials that `make test` runs."""


FAULTS: list[Fault] = []


def fault(number: str, what: str, count: int, short: list[int] | None = None) -> Callable[[Trial], Trial]:
    """Enter a trial into the table; without `short`, all `count` of them are for every day."""

    def enter(trial: Trial) -> Trial:
        FAULTS.append(Fault(number, what, trial, count, list(range(count)) if short is None else short))
        return trial

    return enter


# Where a run can be met, for `at`.
FORWARD = "trainer.training.predictor:Predictor.losses"
READ = "trainer.training.batches:Batches.example"
SAVE = "trainer.core.tensor_files:save_tensors"
ONE_BY_ONE = "hardware.micro_batch=1"


def stopped(lab: Lab, out: Path, forward: int, *settings: str, number: int = signal.SIGKILL) -> Path:
    """The folder of a run that was stopped just before the forward pass of this number, from 1."""
    ended = lab.run(out, *settings, before=at(FORWARD, forward, to_itself(number)))
    assert ended.code == (-number if number == signal.SIGKILL else 128 + number), ended
    return only_run(out)


def assert_continues(lab: Lab, out: Path, *settings: str) -> Ended:
    """That the same command goes on, to the end, as if it had never stopped."""
    ended = lab.run(out, *settings)
    assert ended.code == 0, ended
    lab.assert_as_if_never_stopped(only_run(out), *settings)
    return ended


@fault("F01", "SIGKILL at a random moment", 50, [15, 37])
def killed_at_random(lab: Lab, out: Path, trial: int) -> None:
    settings = ["save.every=1", "steps=8"]
    run = lab.start(out, *settings)
    # One moment in each fiftieth of a run, so that few trials are spread over it too.
    time.sleep(lab.seconds(*settings) / 50 * (trial + rng.uniform("kill", trial)))
    run.signal(signal.SIGKILL)
    assert run.wait().code in (-signal.SIGKILL, 0)
    if list(out.glob("*/checkpoints")):
        folder = only_run(out)
        loaded = checkpoint(folder)
        step = loaded.step if loaded else 0
        assert last_step(folder) - step <= 1
        assert not loaded or {int(moments["step"]) for moments in loaded.optimizer["state"].values()} == {step}
    assert_continues(lab, out, *settings)


@fault("F02", "killed before any operation of a save on the disk", 22, [9, 17])
def killed_in_a_save(lab: Lab, out: Path, trial: int) -> None:
    assert dies_within(lab, out, "trainer.training.checkpoint:Checkpoints.save", trial) == (trial < 21), (
        "all operations have their trial, the last none"
    )


@fault("F02", "killed in the midst of writing the weights", 4, [])
def killed_in_a_write(lab: Lab, out: Path, trial: int) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, ((0, 1, 12_345, 25_000)[trial],) * 2)

    ended = lab.run(out, before=at(SAVE, 3, limit))
    assert ended.code == -signal.SIGXFSZ and list(out.glob("*/checkpoints/.partial-*-step-00000004"))
    assert_continues(lab, out)


@fault("F07", "killed while the third of two checkpoints is discarded", 8, [])
def killed_in_retention(lab: Lab, out: Path, trial: int) -> None:
    assert dies_within(lab, out, "trainer.training.checkpoint:Checkpoints._retain", trial) == (trial < 7)


def dies_within(lab: Lab, out: Path, where: str, trial: int) -> bool:
    """Whether the process died before it came to the end of the fourth save or retention."""
    settings = ["save.every=1", "save.keep=2", "ema=0.9"]
    ended = lab.run(out, *settings, before=dying_within(where, 4, trial + 1))
    assert ended.code in (-signal.SIGKILL, 0), ended
    folder = only_run(out)
    kept = Checkpoints(folder / "checkpoints", 2)
    if ended.code:
        assert kept.newest(set_aside=False).step in (3, 4)
        assert len([kept.load(step) for step in kept.steps()]) >= 2, "all that have the name of a checkpoint are whole"
    said = assert_continues(lab, out, *settings).text
    assert "damaged" not in said and not (folder / "quarantine").exists()
    return ended.code != 0


FILES = (WEIGHTS, OPTIMIZER, STATE, MANIFEST, EMA)


def with_average(lab: Lab, out: Path) -> Path:
    """The newest checkpoint of a stopped run, in which an average is kept too."""
    return (
        copied(lab.template("stopped", lambda place: stopped(lab, place, 5, AVERAGE)), out)
        / "checkpoints"
        / "step-00000004"
    )


AVERAGE = "ema=0.9"


@fault("F03", "a truncated file of the newest checkpoint", 20, [5])
def truncated(lab: Lab, out: Path, trial: int) -> None:
    folder = with_average(lab, out)
    name = FILES[trial // 4]
    path = folder / name
    size = path.stat().st_size
    os.truncate(path, (0, 1, size // 2, size - 1)[trial % 4])
    said = assert_continues(lab, out, AVERAGE).text
    assert "step-00000004 is damaged" in said and "step 2 is used instead" in said
    assert (only_run(out) / "quarantine" / folder.name / name).stat().st_size < size


@fault("F04", "a flipped bit in a file of the newest checkpoint", 100, [6])
def flipped(lab: Lab, out: Path, trial: int) -> None:
    path = with_average(lab, out) / FILES[trial % 5]
    data = bytearray(path.read_bytes())
    data[rng.seed_for("byte", trial) % len(data)] ^= 1 << trial // 5 % 8
    path.write_bytes(data)
    assert "step-00000004 is damaged" in assert_continues(lab, out, AVERAGE).text
    assert (only_run(out) / "quarantine" / "step-00000004" / path.name).read_bytes() == data


@fault("F05", "a partial and an existing folder of the next step", 2, [0])
def next_step_is_there(lab: Lab, out: Path, trial: int) -> None:
    checkpoints = stopped(lab, out, 4) / "checkpoints"
    (checkpoints / ".partial-1-ab-step-00000004").mkdir()
    (checkpoints / ".partial-1-ab-step-00000004" / WEIGHTS).write_bytes(b"half")

    def plant() -> None:
        if trial:
            copied(checkpoints / "step-00000002", checkpoints / "new").rename(checkpoints / "step-00000004")
            (checkpoints / "new").rmdir()
        else:
            (checkpoints / "step-00000004").mkdir()
            (checkpoints / "step-00000004" / WEIGHTS).write_bytes(b"half")

    assert lab.run(out, before=at(FORWARD, 1, plant)).code == 0
    lab.assert_as_if_never_stopped(checkpoints.parent)
    assert Checkpoints(checkpoints, 1).steps() == [2, 4, 5]


@fault("F06", "no room on the disk at a save: later there is, or never", 2, [0])
def disk_full(lab: Lab, out: Path, trial: int) -> None:
    def room(size: int) -> Action:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    # Less than the weights take, and more than all other files.
    scene = at(FORWARD, 3, room(20_000))
    if trial == 0:
        scene = all_of(scene, at("trainer.training.session:Session._evaluate_if_due", 6, room(resource.RLIM_INFINITY)))
    ended = lab.run(out, before=scene)
    folder = only_run(out)
    assert "Could not" in ended.text and "step-00000004" in ended.text
    assert any("step-00000004" in record["text"] for record in records(folder, "warning"))
    good, reference = (tree(path / "checkpoints" / "step-00000002") for path in (folder, lab.reference()))
    assert [data for _, data in good.values()] == [data for _, data in reference.values()]
    if trial == 0:
        assert ended.code == 0
        assert fingerprint(folder) == fingerprint(lab.reference())
        assert Checkpoints(folder / "checkpoints", 1).steps() == [2, 5]
    else:
        assert ended.code == 74
        assert Checkpoints(folder / "checkpoints", 1).steps() == [2]
        assert_continues(lab, out)


@fault("F08", "every checkpoint bad; a mistyped folder", 2)
def nothing_to_resume(lab: Lab, out: Path, trial: int) -> None:
    folder = stopped(lab, out, 5)
    if trial == 0:
        for path in folder.glob(f"checkpoints/*/{WEIGHTS}"):
            os.truncate(path, 100)
        before = tree(folder / "checkpoints")
        ended = lab.run(out)
        assert ended.code == 65 and "step-00000002" in ended.text and "step-00000004" in ended.text
        assert tree(folder / "checkpoints") == before and not (folder / "quarantine").exists()
    else:
        before = tree(out)
        ended = lab.run(out, f"resume={folder}x", "cache.path=null")
        assert ended.code == 64 and f"{folder}x" in ended.text and folder.name in ended.text
        assert tree(out) == before
    assert ended.seconds < at_leisure(3)


@fault("F09", "resumed with other settings", 4, [0])
def other_settings(lab: Lab, out: Path, trial: int) -> None:
    folder = lab.reference()
    before = tree(folder)
    setting, difference = (
        ("method.rank=8", "method.rank: 16 -> 8"),
        ("optimizer.lr=0.5", "optimizer.lr: 0.0001 -> 0.5"),
        ("seed=7", "seed: 0 -> 7"),
        ("steps=4", "steps: 5 -> 4"),
    )[trial]
    ended = lab.run(out, f"resume={folder}", setting)
    assert ended.code == 64 and difference in ended.text and ended.text.count("\n") == 1
    assert tree(folder) == before and list(out.iterdir()) == []


@fault("F09", "the same command after the data or the base weights changed", 2, [0])
def other_data(lab: Lab, out: Path, trial: int) -> None:
    data, model = out / "data", copied(lab.folder / "model", out)
    data.mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (30 * i, 100, 200)).save(data / f"{i}.png")
    captions = [{"file_name": f"{i}.png", "text": f"photo {i}"} for i in range(8)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))
    settings = ["dataset=imagefolder", f"dataset.path={data}", "dataset.validation_fraction=0.3", f"model.path={model}"]
    folder = stopped(lab, out, 4, *settings)
    before = tree(folder / "checkpoints")
    if trial == 0:
        captions[3]["text"] = "another photo"
        (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))
    else:
        (weights,) = (model / "transformer").glob("*.safetensors")
        tensors = load_file(weights)
        tensors[min(tensors)] += 1
        save_file(tensors, weights, {"format": "pt"})
    ended = lab.run(out, *settings)
    assert ended.code == 64 and "fresh=true" in ended.text
    assert ("weights.transformer: ", "data: ")[trial == 0] in ended.text
    assert tree(folder / "checkpoints") == before
    assert lab.run(out, *settings, "fresh=true").code == 0
    assert (out / f"{folder.name}-2" / "summary.json").exists()


@fault("F10", "stopped before every forward pass of two epochs, within accumulation groups", 40, [12, 27])
def stopped_at_every_step(lab: Lab, out: Path, trial: int) -> None:
    stopped(lab, out, 1 + trial // 2, ONE_BY_ONE, number=(signal.SIGKILL, signal.SIGTERM)[trial % 2])
    assert_continues(lab, out, ONE_BY_ONE)


@fault("F11", "the samples read over stops and resumes", 2, [])
def samples_read(lab: Lab, out: Path, trial: int) -> None:
    def noting() -> None:
        from trainer.training.batches import Batches

        example = Batches.example

        def noted(self: Batches, visit: int, index: int) -> dict:
            with (out / "visits.jsonl").open("a") as file:
                file.write(json.dumps([visit, self.samples[index].id]) + "\n")
            return example(self, visit, index)

        Batches.example = noted

    settings = [f"hardware.workers={2 * trial}"]
    for forward in (3, 2):
        lab.run(out, *settings, before=all_of(noting, at(FORWARD, forward, to_itself(signal.SIGTERM))))
    lab.finish(out, *settings, before=noting)
    noted = [json.loads(line) for line in (out / "visits.jsonl").read_text().splitlines()]
    stream = dict(noted)
    assert all(stream[visit] == name for visit, name in noted), "one visit, one sample, in every attempt"
    assert sorted(stream) == list(range(20))
    for epoch in (0, 1):
        assert len({stream[visit] for visit in range(10 * epoch, 10 * epoch + 10)}) == 10


@fault("F12", "five stops in a row", 1, [])
def five_stops(lab: Lab, out: Path, trial: int) -> None:
    for step in range(1, 5):
        folder = stopped(lab, out, 2, number=signal.SIGTERM)
        assert checkpoint(folder).step == last_step(folder) == step
    assert lab.run(out, before=at("trainer.export.write:export_after_training", 1, to_itself(signal.SIGTERM))).code == 143
    assert_continues(lab, out)


@fault("F12", "loader workers and how often is evaluated change no bit", 4, [])
def same_bits(lab: Lab, out: Path, trial: int) -> None:
    setting = ("hardware.workers=2", "evaluation.every=1", "evaluation.every=1000", "hardware.workers=1")[trial]
    folder = lab.finish(out, setting)
    assert fingerprint(folder, state=False) == fingerprint(lab.reference(), state=False)
    assert train_losses(folder) == train_losses(lab.reference())


@fault("F12", "micro-batches of one batch; five samples in twos", 3, [2])
def micro_batches(lab: Lab, out: Path, trial: int) -> None:
    size, batch = ((1, 4), (2, 4), (2, 5))[trial]
    folder = lab.finish(out, f"hardware.micro_batch={size}", f"batch={batch}")
    assert train_losses(folder) == pytest.approx(train_losses(lab.reference(f"batch={batch}")), abs=1e-6)


def train_losses(folder: Path) -> dict[int, float]:
    return {step: loss for step, key, loss in losses(folder) if key == "train/loss"}


# (where, how often before, after the call or before it)
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
def told_to_stop(lab: Lab, out: Path, trial: int) -> None:
    number = (signal.SIGTERM, signal.SIGINT)[trial % 2]
    where, call, after = MOMENTS[trial // 2]
    # Its own cache, so that there is something to fill; an average, which takes the weights' place while it is judged.
    settings = [f"cache.path={out}/cache", AVERAGE]
    assert_stops(lab, out, lab.run(out, *settings, before=at(where, call, to_itself(number), after)), number, AVERAGE)


@fault("F13", "SIGTERM and Ctrl-C at a random moment, to the loader's workers too", 30, [11])
def told_to_stop_at_random(lab: Lab, out: Path, trial: int) -> None:
    settings = ["hardware.workers=2"]
    number = (signal.SIGTERM, signal.SIGINT)[trial % 2]
    run = lab.start(out, *settings)
    moment = lab.seconds(*settings) / 30 * (trial + rng.uniform("stop", trial))
    time.sleep(moment)
    run.signal_all(number)
    ended = run.wait()
    ended.seconds -= moment
    assert_stops(lab, out, ended, number, *settings)
    assert processes(run.pid) == []


def assert_stops(lab: Lab, out: Path, ended: Ended, number: int, *settings: str) -> None:
    # A signal that comes before the program has begun, or when it is over, finds the system's own handling.
    over = "training_curves.png" in ended.text
    assert (
        ended.code == 128 + number
        or (over and ended.code in (0, -number))
        or (not ended.text and ended.code == -number)
    ), ended
    assert ended.seconds < at_leisure(5)
    assert "Traceback" not in ended.text
    if list(out.glob("*/journal.jsonl")) and last_step(only_run(out)):
        assert checkpoint(only_run(out)).step == last_step(only_run(out))
    assert_continues(lab, out, *settings)


@fault("F13", "a signal while the program imports", 4, [])
def told_to_stop_while_importing(lab: Lab, out: Path, trial: int) -> None:
    with command([*lab.settings, f"out={out}"]) as run:
        time.sleep(0.2 + 0.7 * trial)
        run.send_signal(signal.SIGTERM)
        began = time.monotonic()
        said = run.communicate(timeout=20)[1]
        # Before our own first line Python ends as any program does; to the shell 143 is both.
        assert run.returncode in (143, -signal.SIGTERM) and "Error" not in said, said
        assert time.monotonic() - began < 5


@fault("F13", "a second signal", 2, [1])
def told_twice(lab: Lab, out: Path, trial: int) -> None:
    numbers = [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)][trial]
    scene = all_of(at(FORWARD, 4, to_itself(numbers[0])), at(SAVE, 4, to_itself(numbers[1])))
    ended = lab.run(out, before=scene)
    assert ended.code == 128 + numbers[1]
    assert checkpoint(only_run(out)).step == 2, "the save of step 3 was cut short"
    assert_continues(lab, out)


MANY = ["-m", "seed=1,2,3,4", "hydra.launcher.slots=1"]


@fault("F14", "SIGTERM in the second of four jobs: in one process, as members of their own", 2, [])
def sweep_told_to_stop(lab: Lab, out: Path, trial: int) -> None:
    if trial == 0:
        many = ["-m", "seed=1,2,3,4", "hydra/launcher=basic"]
        ended = lab.run(out, *many, before=at(FORWARD, 8, to_itself(signal.SIGTERM)))
    else:
        many = MANY
        run = lab.start(out, *many)
        second_member(out)
        run.signal(signal.SIGTERM)
        ended = run.wait()
    assert ended.code == 143 and "Traceback" not in ended.text, ended
    finished = {
        path: path.stat().st_mtime_ns
        for path in out.glob("*/summary.json")
        if json.loads(path.read_text())["status"] == "finished"
    }
    assert len(finished) == 1 and len(list(out.glob("*/run.json"))) == 2
    ended = lab.run(out, *many)
    assert ended.code == 0, ended
    assert len(list(out.glob("*/export"))) == 4
    assert [path.stat().st_mtime_ns for path in finished] == list(finished.values())


def second_member(out: Path) -> int:
    """The process of the second member of a sweep, once it trains; at its very first step it waits for what comes."""
    deadline = time.monotonic() + at_leisure(60)
    while time.monotonic() < deadline:
        begun = [path for path in out.glob("*/journal.jsonl") if not (path.parent / "summary.json").exists()]
        if begun and len(list(out.glob("*/journal.jsonl"))) == 2:
            return int((begun[0].parent / "lock").read_text().split()[1])
        time.sleep(0.005)
    raise TimeoutError("the second member does not begin")


@fault("F28", "the second of three members ends by itself, is aborted, is killed; then the same sweep again", 3, [])
def member_fails(lab: Lab, out: Path, trial: int) -> None:
    if trial == 0:
        many = ["-m", "optimizer.lr=1e-4,1e30,1e-3"]
        ended = lab.run(out, *many)
    else:
        many = ["-m", "seed=1,2,3"]
        run = lab.start(out, *many)
        os.kill(second_member(out), (signal.SIGABRT, signal.SIGKILL)[trial - 1])
        ended = run.wait()
    (note,) = out.glob("sweeps/*/sweep.json")
    members = json.loads(note.read_text())["members"]
    assert ended.code == 1 and [member["status"] for member in members] == ["finished", "failed", "finished"], ended
    assert (note.parent / "ranking.md").exists() and members[1]["reason"] in ended.text
    told = (out / members[1]["folder"] / "log.txt").read_text() if trial == 0 else Path(members[1]["log"]).read_text()
    assert ("Traceback", "Fatal Python error: Aborted", "")[trial] in told
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoints/*/MANIFEST")}
    ended = lab.run(out, *many)
    members = json.loads(note.read_text())["members"]
    assert [member["status"] for member in members] == ["finished", "failed" if trial == 0 else "finished", "finished"]
    assert ended.code == (1 if trial == 0 else 0) and all(
        path.stat().st_mtime_ns == then for path, then in finished.items()
    )


@fault("F15", "a loader worker is killed, or hangs", 2, [0])
def worker_dies(lab: Lab, out: Path, trial: int) -> None:
    def impatient() -> None:
        from trainer.training import loader

        loader.STALL_TIMEOUT = 2

    settings = ["hardware.workers=2"]
    how = (signal.SIGKILL, signal.SIGSTOP)[trial]
    run = lab.start(out, *settings, before=all_of(impatient, at(READ, 6, to_itself(how))))
    ended = run.wait()
    assert ended.code == 74 and "train-00000" in ended.text and "Traceback" not in ended.text, ended
    assert ended.seconds < at_leisure(10)
    assert processes(run.pid) == []
    assert_continues(lab, out, *settings)


@fault("F16", "NaN: in the base, after too large a step, in a gradient alone, in one micro-batch of four", 4, [3])
def not_finite(lab: Lab, out: Path, trial: int) -> None:
    settings, spoil, step = ["save.every=1"], None, 3
    if trial == 0:
        model = copied(lab.folder / "model", out)
        (weights,) = (model / "transformer").glob("*.safetensors")
        tensors = load_file(weights)
        tensors[min(tensors)] *= float("nan")
        save_file(tensors, weights, {"format": "pt"})
        settings, step = ["save.every=1", f"model.path={model}"], 1
    elif trial == 1:
        settings, step = ["save.every=1", "optimizer.lr=1e30"], 2
    elif trial == 2:
        # 0, whose derivative is not.
        spoil = spoiled(3, lambda loss: loss + (loss - loss).sqrt())
    else:
        settings.append(ONE_BY_ONE)
        spoil = spoiled(10, lambda loss: loss * float("inf"))
    ended = lab.run(out, *settings, before=spoil)
    assert ended.code == 70 and f"step {step}" in ended.text and "Traceback" not in ended.text, ended
    folder = only_run(out)
    (failed,) = records(folder, "failed")
    assert len(Counter(word for word in failed["reason"].replace(",", " ").split() if word.startswith("train-"))) == 4
    assert Checkpoints(folder / "checkpoints", 3).steps() == list(range(1, step)), "nothing was saved of it"
    if spoil:
        assert_continues(lab, out, *settings)


def spoiled(call: int, how: Callable) -> Action:
    """A scene: the losses of this forward pass, from 1, become something else."""

    def set_up() -> None:
        from trainer.training.predictor import Predictor

        losses, count = Predictor.losses, 0

        def spoil(self: Predictor, micro_batch: dict):
            nonlocal count
            count += 1
            return how(losses(self, micro_batch)) if count == call else losses(self, micro_batch)

        Predictor.losses = spoil

    return set_up


@fault("F16", "NaN: up to so many steps in a row are skipped", 3, [2])
def skipped(lab: Lab, out: Path, trial: int) -> None:
    """Steps 2 and 3 are bad: one may be skipped, or two, or two after the run has stopped at the first."""
    spoil = all_of(*(spoiled(step, lambda loss: loss * float("nan")) for step in (2, 3)))
    settings = ["save.every=1", "save.keep=9", "skip_nonfinite=2"]
    if trial == 0:
        ended = lab.run(out, *settings, "skip_nonfinite=1", before=spoil)
        assert ended.code == 70 and "At step 3" in ended.text and "skip_nonfinite=2" in ended.text
        assert Checkpoints(only_run(out) / "checkpoints", 9).steps() == [1, 2]
    elif trial == 1:
        assert lab.run(out, before=spoil).code == 70
        assert lab.run(out, *settings, before=spoil).code == 0
    else:
        ended = lab.run(out, *settings, before=spoil)
        assert ended.code == 0 and ended.text.count("It is skipped") == 2
    folder = only_run(out)
    kept = Checkpoints(folder / "checkpoints", 9)
    before, after = kept.load(1), kept.load(2)
    assert digest([before.weights, before.optimizer]) == digest([after.weights, after.optimizer])
    assert all(len(record["samples"]) == 4 for record in records(folder, "not_finite"))
    assert {record["step"] for record in records(folder, "not_finite")} == {2, 3}
    if trial:
        assert [step for step, key, _ in losses(folder) if key == "train/loss"] == [1, 4, 5]


GIB = 2**30


def greedy(appetite: int) -> Action:
    """A scene: each sample of a forward pass wants that many bytes, where the system gives 3.5 GiB."""

    def set_up() -> None:
        from trainer.training.predictor import Predictor

        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + 7 * GIB // 2, resource.RLIM_INFINITY))
        predict = Predictor.predict

        def eat(self: Predictor, latents: torch.Tensor, *others: Any) -> torch.Tensor:
            torch.empty(len(latents) * appetite, dtype=torch.uint8)
            return predict(self, latents, *others)

        Predictor.predict = eat

    return set_up


@fault("F18", "memory for three samples; not even for one; none for the network", 3, [0, 2])
def out_of_memory(lab: Lab, out: Path, trial: int) -> None:
    if trial == 0:
        ended = lab.run(out, before=greedy(GIB))
        folder = only_run(out)
        assert ended.code == 0 and "from now on a forward pass has at most 2 sample(s)" in ended.text
        assert len(records(folder, "warning")) == 1
        assert losses(folder) == [
            (step, key, pytest.approx(loss, abs=1e-6)) for step, key, loss in losses(lab.reference())
        ]
        return
    nothing = at("trainer.training.session:build_network", 1, lambda: torch.empty(2**50, dtype=torch.uint8))
    ended = lab.run(out, before=greedy(4 * GIB) if trial == 1 else nothing)
    assert ended.code == 71 and "Traceback" not in ended.text, ended
    # What costs nothing but time comes before what makes another run.
    assert (
        0
        < ended.text.index("gradient_checkpointing=true")
        < ended.text.index("precision=bf16")
        < ended.text.index("dataset.resolution=")
    )
    (failed,) = records(only_run(out), "failed")
    assert "precision=bf16" in failed["reason"]
    assert_continues(lab, out)


@fault("F25", "a second run on the folder; a dead owner", 2, [0])
def two_runs(lab: Lab, out: Path, trial: int) -> None:
    settings = ["hardware.workers=1"]
    met = out / "met"

    def wait() -> None:
        met.touch()
        while met.exists():
            time.sleep(0.01)

    first = lab.start(out, *settings, before=at(FORWARD, 3, wait))
    deadline = time.monotonic() + at_leisure(60)
    while not met.exists():
        assert time.monotonic() < deadline, first.output.read_text()
        time.sleep(0.01)
    if trial == 0:
        second = lab.run(out, *settings)
        assert second.code == 75 and f"process {first.pid}" in second.text and second.seconds < at_leisure(2)
        met.unlink()
        assert first.wait().code == 0
        lab.assert_as_if_never_stopped(only_run(out), *settings)
    else:
        first.signal(signal.SIGKILL)
        first.wait()
        assert_continues(lab, out, *settings)


@fault("F26", "eight runs at once on a fresh MLflow store", 1, [])
def eight_at_once(lab: Lab, out: Path, trial: int) -> None:
    from trainer.tracking.mlflow_store import import_mlflow

    lab.reference()
    import_mlflow()
    runs = [lab.start(out, "tracking=mlflow", f"seed={seed}") for seed in range(1, 9)]
    for seed, run in enumerate(runs, 1):
        ended = run.wait()
        assert ended.code == 0, ended
        if "does not answer" in ended.text:
            # So slow a machine that one lost patience while another made the store; it has said what to type.
            assert lab.run(out, "tracking=mlflow", f"seed={seed}").code == 0
    with contextlib.closing(sqlite3.connect(out / "mlflow.db")) as database:
        assert database.execute(
            "SELECT count(*), count(DISTINCT name) FROM runs WHERE status = 'FINISHED'"
        ).fetchone() == (8, 8)
        assert database.execute("SELECT count(*) FROM experiments WHERE name = 'trainer'").fetchone() == (1,)
    folders = [path.parent for path in out.glob("*/run.json")]
    assert points(out) == Counter(point for folder in folders for point in journaled(folder))


def points(out: Path) -> Counter[tuple[str, int]]:
    """How often the store in `out` has each point of each metric."""
    with contextlib.closing(sqlite3.connect(out / "mlflow.db")) as database:
        return Counter(database.execute("SELECT key, step FROM metrics"))


def journaled(folder: Path) -> list[tuple[str, int]]:
    return [(key, record["step"]) for record in records(folder, "metrics") for key in record["values"]]


@fault("F27", "MLflow is down at the start, goes in the middle, is locked; then it is back", 3, [])
def mlflow_away(lab: Lab, out: Path, trial: int) -> None:
    from mlflow_helpers import server

    from trainer.tracking import ui
    from trainer.tracking.mlflow_store import import_mlflow

    import_mlflow()
    port = ui.free_port(5700)
    settings = ["tracking=mlflow"] + ([] if trial == 2 else [f"tracking.uri=http://127.0.0.1:{port}"])
    with contextlib.ExitStack() as stack:
        gone = None
        if trial == 1:
            process = stack.enter_context(server(out, port))
            gone = at(FORWARD, 3, lambda: os.killpg(process.pid, signal.SIGKILL))
        if trial == 2:
            # Another run made the store; now somebody holds it.
            lab.finish(out, *settings, "seed=9")
            database = stack.enter_context(contextlib.closing(sqlite3.connect(out / "mlflow.db", isolation_level=None)))
            database.execute("BEGIN EXCLUSIVE")
        ended = lab.run(out, *settings, before=gone)
    assert ended.code == 0 and "Traceback" not in ended.text, ended
    (folder,) = (
        path.parent for path in out.glob("*/run.json") if json.loads(path.read_text())["settings"]["seed"] == 0
    )
    assert fingerprint(folder) == fingerprint(lab.reference())
    with server(out, port) if trial < 2 else contextlib.nullcontext():
        ended = lab.run(out, *settings)
    assert ended.code == 0 and "sending the rest of this run to the tracker" in ended.text, ended
    assert points(out) == Counter(point for path in out.glob("*/run.json") for point in journaled(path.parent))


@fault("F31", "model folders that bring code of their own", 2, [0])
def code_in_a_model(lab: Lab, out: Path, trial: int) -> None:
    model, canary = copied(lab.folder / "model", out), out / "canary"
    for path in sorted(model.glob("*/*config.json")):
        (path.parent / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
        config = json.loads(path.read_text())
        config |= {
            "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil"),
            "trust_remote_code": True,
        }
        if trial:
            config |= {"_class_name": "evil.Evil", "architectures": ["evil.Evil"], "tokenizer_class": "evil.Evil"}
        path.write_text(json.dumps(config))
    ended = lab.run(out, f"model.path={model}", f"cache.path={out}/cache")
    assert ended.code in (0, 64, 65) and "Traceback" not in ended.text, ended
    assert not canary.exists()


SECRET = "hf_" + "Q7" * 12


@fault("F32", "a token in the environment and in an exception; on the command line", 3, [0, 2])
def token(lab: Lab, out: Path, trial: int) -> None:
    if trial == 2:
        ended = lab.run(out, f"name={SECRET}")
        assert ended.code == 64 and list(out.iterdir()) == []
    else:

        def leak() -> None:
            raise RuntimeError(f"401 for https://somebody:{SECRET}@example.org and of-no-known-form")

        def environment() -> None:
            os.environ |= {"HF_TOKEN": SECRET, "SOMEBODYS_PASSWORD": "of-no-known-form"}

        settings = ["tracking=" + ("none", "mlflow")[trial], f"cache.path={out}/cache"]
        ended = lab.run(out, *settings, before=all_of(environment, at(FORWARD, 4, leak)))
        assert ended.code == 1 and "401 for https://somebody:***@example.org and ***" in ended.text, ended
        assert lab.run(out, *settings, before=environment).code == 0
    everything = ended.text.encode() + b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert SECRET.encode() not in everything and b"of-no-known-form" not in everything


def header(text: str, length: int | None = None) -> bytes:
    """The beginning of a safetensors file."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode()


ABSURD = [
    header("", 2**63 - 1),
    header("{}", 2**40),
    header('{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
    header(
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    + bytes(12),
    header('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    header("[" * 100_000),
]


@fault(
    "F33",
    "absurd safetensors: of the denoiser, the VAE, a text encoder, what training begins with",
    4 * len(ABSURD),
    [2, 9],
)
def absurd(lab: Lab, out: Path, trial: int) -> None:
    model = copied(lab.folder / "model", out)
    place = ("transformer", "vae", "text_encoder", None)[trial % 4]
    (path,) = (model / place).glob("*.safetensors") if place else [out / "begin.safetensors"]
    path.write_bytes(ABSURD[trial // 4])
    settings = [f"model.path={model}", f"cache.path={out}/cache"] + ([] if place else [f"method.init_from={path}"])

    def limit() -> None:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + GIB // 2, resource.RLIM_INFINITY))

    ended = lab.run(out, *settings, before=limit)
    assert ended.code == 65 and str(path) in ended.text and "Traceback" not in ended.text, ended


@fault("F34", "a clock that is set back, and files whose times say nothing", 1, [])
def clock_set_back(lab: Lab, out: Path, trial: int) -> None:
    folder = stopped(lab, out, 5)
    for age, path in enumerate(sorted(folder.rglob("*"), reverse=True)):
        os.utime(path, (10**9 - age, 10**9 - age))

    def yesterday() -> None:
        clock = time.time
        time.time = lambda: clock() - 86_400

    assert lab.run(out, before=yesterday).code == 0
    lab.assert_as_if_never_stopped(folder)


@fault("F34", "a folder that is a file; one that cannot be written; one that was moved", 3, [1])
def wrong_folder(lab: Lab, out: Path, trial: int) -> None:
    if trial == 0:
        (out / "file").write_text("mine")
        ended = lab.run(out, f"out={out}/file")
        assert ended.code == 74 and "out=" in ended.text and (out / "file").read_text() == "mine"
    elif trial == 1:
        out.chmod(0o555)
        ended = lab.run(out, before=as_anybody)
        assert ended.code == 74 and "out=" in ended.text and "Traceback" not in ended.text
    else:
        folder = stopped(lab, out, 4)
        moved = folder.rename(lab.place() / "elsewhere")
        assert lab.run(out, f"resume={moved}").code == 0
        lab.assert_as_if_never_stopped(moved)
        assert list(out.iterdir()) == []


def as_anybody() -> None:
    """Give up root's right to write everywhere."""
    if os.geteuid() == 0:
        version, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(version, nothing) == 0


ELSEWHERE = {
    "F02": ["test_checkpoint.py::test_dying_at_any_operation_of_a_save_leaves_the_old_or_new_checkpoint"],
    "F04": ["test_checkpoint.py::test_all_of_a_hundred_flipped_bits_are_detected"],
    "F17": [
        "test_cache.py::test_non_finite_encoder_output_is_refused_and_the_sample_named",
        "test_cache.py::test_a_nan_in_an_entry_is_refused_even_if_its_digest_is_right",
    ],
    "F19": [
        "test_cache.py::test_an_edited_caption_makes_one_prompt_again_and_no_image",
        "test_cache.py::test_a_replaced_image_of_equal_name_size_and_mtime_is_encoded_again",
        "test_cache.py::test_another_encoder_template_or_schema_makes_its_tensor_again",
    ],
    "F20": [
        "test_cache.py::test_processes_that_fill_one_cache_make_the_entries_of_a_single_one",
        "test_cache.py::test_a_killed_writer_leaves_no_truncated_entry",
    ],
    "F21": [
        "test_dataset.py -k truncated or html or cmyk or sixteen or alpha or exif or animation or thin or say_what_they_are"
    ],
    "F22": ["test_dataset.py::test_a_decompression_bomb_is_refused_from_its_header"],
    "F23": ["test_dataset.py -k climbs_out or links_out"],
    "F24": ["test_dataset.py -k every_fault or counted"],
    "F26": ["test_mlflow_server.py -k eight_processes or killed_while_creating"],
    "F27": ["test_tracking.py -k locked_database", "test_mlflow_server.py -k server_that"],
    "F30": ["test_checkpoint.py -k pickle", "test_cache.py -k pickle"],
    "F31": ["test_command_line.py -k hydra_would_load"],
    "F32": ["test_command_line.py -k secret or access_token"],
}
"""Tests of other files that belong to a fault, as pytest is asked for them: of one part, where the whole program would show it less well."""


def named(given: tuple[Fault, int]) -> str:
    return f"{given[0].number} {given[0].what} [{given[1]}]"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("given", [(fault, trial) for fault in FAULTS for trial in fault.short], ids=named)
def test_the_program_survives(given: tuple[Fault, int], lab: Lab):
    given[0].trial(lab, lab.place(), given[1])


def main(numbers: list[str]) -> int:
    """Every trial of the table (or of those numbers alone), and the count."""
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        for fault in (fault for fault in FAULTS if not numbers or fault.number in numbers):
            good = sum(succeeds(fault, trial, lab) for trial in range(fault.count))
            counts.append((good, fault.count))
            print(f"{fault.number} {fault.what}: {good}/{fault.count}", flush=True)
    for number, tests in ELSEWHERE.items():
        for test in tests if not numbers or number in numbers else ():
            counts.append(passed(test))
            print(f"{number} {test}: {counts[-1][0]}/{counts[-1][1]}", flush=True)
    good, count = map(sum, zip(*counts, strict=True))
    print(f"{good}/{count}")
    return good < count


def succeeds(fault: Fault, trial: int, lab: Lab) -> bool:
    try:
        fault.trial(lab, lab.place(), trial)
    except Exception:
        print(f"{fault.number} {fault.what} [{trial}]")
        traceback.print_exc(file=sys.stdout)
        return False
    return True


def passed(test: str) -> tuple[int, int]:
    """How many of these tests passed, of how many; none at all counts as one that failed."""
    name, _, chosen = test.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "", f"{Path(__file__).parent / name}", "-k", chosen]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", said.splitlines()[-1])}
    if set(counts) != {"passed"}:
        print(said)
    return counts.get("passed", 0), sum(counts.values()) or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
