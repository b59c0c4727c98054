"""What the program must survive, one table for all: a few trials of each in `make test`, all of them in `make faults`.

The numbers are those of the project's list of faults. REF is the same run, uninterrupted; H is the fingerprint of its last checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
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
    checkpoint,
    command,
    copied,
    digest,
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

from trainer import streams
from trainer.checkpoint import MANIFEST, OPTIMIZER, STATE, WEIGHTS, Checkpoints

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
FORWARD = "trainer.run:Training._losses"
READ = "trainer.loader:Batches.row"
SAVE = "trainer.files:save_tensors"
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


@fault("F01", "SIGKILL at a random moment", 50, [4, 15, 26, 37, 48])
def killed_at_random(lab: Lab, out: Path, trial: int) -> None:
    settings = ["save.every=1", "steps=8"]
    run = lab.start(out, *settings)
    # One moment in each fiftieth of a run, so that few trials are spread over it too.
    time.sleep(lab.seconds(*settings) / 50 * (trial + streams.fraction("kill", trial)))
    run.signal(signal.SIGKILL)
    assert run.wait().code in (-signal.SIGKILL, 0)
    if list(out.glob("*/checkpoints")):
        folder = only_run(out)
        loaded = checkpoint(folder)
        step = loaded.step if loaded else 0
        assert last_step(folder) - step <= 1
        assert not loaded or {int(moments["step"]) for moments in loaded.optimizer["state"].values()} == {step}
    assert_continues(lab, out, *settings)


@fault("F03", "a truncated file of the newest checkpoint", 16, [5])
def truncated(lab: Lab, out: Path, trial: int) -> None:
    folder = stopped(lab, out, 5)
    name = (WEIGHTS, OPTIMIZER, STATE, MANIFEST)[trial // 4]
    path = folder / "checkpoints" / "step-00000004" / name
    size = path.stat().st_size
    os.truncate(path, (0, 1, size // 2, size - 1)[trial % 4])
    said = assert_continues(lab, out).text
    assert "step-00000004 is damaged" in said and "step 2 is used instead" in said
    assert (folder / "quarantine" / "step-00000004" / name).stat().st_size < size


@fault("F04", "a flipped bit in a file of the newest checkpoint", 20, [7])
def flipped(lab: Lab, out: Path, trial: int) -> None:
    folder = stopped(lab, out, 5)
    path = folder / "checkpoints" / "step-00000004" / (WEIGHTS, OPTIMIZER, STATE, MANIFEST)[trial % 4]
    data = bytearray(path.read_bytes())
    data[streams.number("byte", trial) % len(data)] ^= 1 << trial % 8
    path.write_bytes(data)
    assert "step-00000004 is damaged" in assert_continues(lab, out).text
    assert (folder / "quarantine" / "step-00000004" / path.name).read_bytes() == data


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


@fault("F06", "no room on the disk at a save: later there is, or never", 2)
def disk_full(lab: Lab, out: Path, trial: int) -> None:
    def room(size: int) -> Action:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    # Less than the weights take, and more than all other files.
    scene = at(FORWARD, 3, room(20_000))
    if trial == 0:
        scene = all_of(scene, at("trainer.run:Training._evaluate_if_due", 6, room(resource.RLIM_INFINITY)))
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
    assert ended.seconds < 3


@fault("F09", "resumed with other settings", 4)
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


@fault("F09", "the same command after the data or the base weights changed", 2)
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


@fault("F10", "stopped before every forward pass of two epochs, within accumulation groups", 40, [1, 12, 27, 34])
def stopped_at_every_step(lab: Lab, out: Path, trial: int) -> None:
    stopped(lab, out, 1 + trial // 2, ONE_BY_ONE, number=(signal.SIGKILL, signal.SIGTERM)[trial % 2])
    assert_continues(lab, out, ONE_BY_ONE)


@fault("F11", "the samples read over stops and resumes", 2, [1])
def samples_read(lab: Lab, out: Path, trial: int) -> None:
    def noting() -> None:
        from trainer.loader import Batches

        row = Batches.row

        def noted(self: Batches, visit: int, index: int) -> dict:
            with (out / "visits.jsonl").open("a") as file:
                file.write(json.dumps([visit, self.samples[index].id]) + "\n")
            return row(self, visit, index)

        Batches.row = noted

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


@fault("F12", "five stops in a row", 1)
def five_stops(lab: Lab, out: Path, trial: int) -> None:
    for step in range(1, 5):
        folder = stopped(lab, out, 2, number=signal.SIGTERM)
        assert checkpoint(folder).step == last_step(folder) == step
    assert lab.run(out, before=at("trainer.export:after_training", 1, to_itself(signal.SIGTERM))).code == 143
    assert_continues(lab, out)


@fault("F12", "loader workers and how often is evaluated change no bit", 4, [0, 1])
def same_bits(lab: Lab, out: Path, trial: int) -> None:
    setting = ("hardware.workers=2", "evaluation.every=1", "evaluation.every=1000", "hardware.workers=1")[trial]
    folder = lab.finish(out, setting)
    assert fingerprint(folder, state=False) == fingerprint(lab.reference(), state=False)
    assert train_losses(folder) == train_losses(lab.reference())


@fault("F12", "micro-batches of one batch; five samples in twos", 3, [0, 2])
def micro_batches(lab: Lab, out: Path, trial: int) -> None:
    size, batch = ((1, 4), (2, 4), (2, 5))[trial]
    folder = lab.finish(out, f"hardware.micro_batch={size}", f"batch={batch}")
    assert train_losses(folder) == pytest.approx(train_losses(lab.reference(f"batch={batch}")), abs=1e-6)


def train_losses(folder: Path) -> dict[int, float]:
    return {step: loss for step, key, loss in losses(folder) if key == "train/loss"}


# (where, how often before, after the call or before it)
MOMENTS = [
    ("trainer.dataset:split", 1, False),
    ("trainer.cache:Cache.put", 7, False),
    ("trainer.network:build", 1, True),
    ("trainer.judge:held_out_loss", 1, False),
    ("trainer.judge:held_out_loss", 2, True),
    ("trainer.judge:Judge._draw", 3, True),
    ("torch.optim:AdamW.step", 1, False),
    ("torch.optim:AdamW.step", 4, True),
    ("trainer.tracking.journal:Journal.metrics", 4, False),
    (SAVE, 1, False),
    (SAVE, 4, True),
    ("trainer.checkpoint:Checkpoints._retain", 2, False),
    ("trainer.run:Training._finish", 1, False),
    ("trainer.tracking.curves:write_summary", 1, False),
]


@fault("F13", "SIGTERM and Ctrl-C at every kind of moment", 2 * len(MOMENTS), [2, 9, 10, 15, 16, 21])
def told_to_stop(lab: Lab, out: Path, trial: int) -> None:
    number = (signal.SIGTERM, signal.SIGINT)[trial % 2]
    where, call, after = MOMENTS[trial // 2]
    settings = [f"cache.path={out}/cache"]
    assert_stops(lab, out, lab.run(out, *settings, before=at(where, call, to_itself(number), after)), number)


@fault("F13", "SIGTERM and Ctrl-C at a random moment, to the loader's workers too", 30, [11])
def told_to_stop_at_random(lab: Lab, out: Path, trial: int) -> None:
    settings = ["hardware.workers=2"]
    number = (signal.SIGTERM, signal.SIGINT)[trial % 2]
    run = lab.start(out, *settings)
    moment = lab.seconds(*settings) / 30 * (trial + streams.fraction("stop", trial))
    time.sleep(moment)
    run.signal_all(number)
    ended = run.wait()
    ended.seconds -= moment
    assert_stops(lab, out, ended, number, *settings)
    assert processes(run.pid) == []


def assert_stops(lab: Lab, out: Path, ended: Ended, number: int, *settings: str) -> None:
    # A signal that comes before the program has begun, or when it is over, finds the system's own handling.
    over = "compare runs" in ended.text
    assert ended.code == 128 + number or (over and ended.code in (0, -number)) or (not ended.text and ended.code == -number), ended
    assert ended.seconds < 5
    assert "Traceback" not in ended.text
    if list(out.glob("*/journal.jsonl")) and last_step(only_run(out)):
        assert checkpoint(only_run(out)).step == last_step(only_run(out))
    assert_continues(lab, out, *settings)


@fault("F13", "a signal while the program imports", 4, [2])
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


@fault("F15", "a loader worker is killed, or hangs", 2)
def worker_dies(lab: Lab, out: Path, trial: int) -> None:
    def impatient() -> None:
        from trainer import loader

        loader.STALLED = 2

    settings = ["hardware.workers=2"]
    how = (signal.SIGKILL, signal.SIGSTOP)[trial]
    run = lab.start(out, *settings, before=all_of(impatient, at(READ, 6, to_itself(how))))
    ended = run.wait()
    assert ended.code == 74 and "train-00000" in ended.text and "Traceback" not in ended.text, ended
    assert ended.seconds < 10
    assert processes(run.pid) == []
    assert_continues(lab, out, *settings)


@fault("F16", "NaN: in the base, after too large a step, in a gradient alone, in one micro-batch of four", 4)
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
        from trainer.run import Training

        function, count = Training._losses, 0

        def spoil(self: Training, rows: dict):
            nonlocal count
            count += 1
            return how(function(self, rows)) if count == call else function(self, rows)

        Training._losses = spoil

    return set_up


@fault("F16", "NaN: up to so many steps in a row are skipped", 3, [0, 2])
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
        from trainer.judge import Judge

        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + 7 * GIB // 2, resource.RLIM_INFINITY))
        predict = Judge.predict

        def eat(self: Judge, x: torch.Tensor, *others: Any) -> torch.Tensor:
            torch.empty(len(x) * appetite, dtype=torch.uint8)
            return predict(self, x, *others)

        Judge.predict = eat

    return set_up


@fault("F18", "memory for three samples; not even for one; none for the network", 3)
def out_of_memory(lab: Lab, out: Path, trial: int) -> None:
    if trial == 0:
        ended = lab.run(out, before=greedy(GIB))
        folder = only_run(out)
        assert ended.code == 0 and "from now on 2 sample(s) a forward pass" in ended.text
        assert len(records(folder, "warning")) == 1
        assert losses(folder) == [(step, key, pytest.approx(loss, abs=1e-6)) for step, key, loss in losses(lab.reference())]
        return
    nothing = at("trainer.network:build", 1, lambda: torch.empty(2**50, dtype=torch.uint8))
    ended = lab.run(out, before=greedy(4 * GIB) if trial == 1 else nothing)
    assert ended.code == 71 and "Traceback" not in ended.text, ended
    # What costs nothing but time comes before what makes another run.
    assert (
        0 < ended.text.index("gradient_checkpointing=true") < ended.text.index("precision=bf16") < ended.text.index("dataset.resolution=")
    )
    (failed,) = records(only_run(out), "failed")
    assert "precision=bf16" in failed["reason"]
    assert_continues(lab, out)


@fault("F25", "a second run on the folder; a dead owner", 2)
def two_runs(lab: Lab, out: Path, trial: int) -> None:
    settings = ["hardware.workers=1"]
    met = out / "met"

    def wait() -> None:
        met.touch()
        while met.exists():
            time.sleep(0.01)

    first = lab.start(out, *settings, before=at(FORWARD, 3, wait))
    while not met.exists():
        time.sleep(0.01)
    if trial == 0:
        second = lab.run(out, *settings)
        assert second.code == 75 and f"process {first.pid}" in second.text and second.seconds < 2
        met.unlink()
        assert first.wait().code == 0
        lab.assert_as_if_never_stopped(only_run(out), *settings)
    else:
        first.signal(signal.SIGKILL)
        first.wait()
        assert_continues(lab, out, *settings)


@fault("F34", "a folder that is a file; one that cannot be written; one that was moved", 3)
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
    table = [fault for fault in FAULTS if not numbers or fault.number in numbers]
    passed = 0
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        for fault in table:
            good = 0
            for trial in range(fault.count):
                try:
                    fault.trial(lab, lab.place(), trial)
                    good += 1
                except Exception:
                    print(f"{fault.number} {fault.what} [{trial}]")
                    traceback.print_exc(file=sys.stdout)
            print(f"{fault.number} {fault.what}: {good}/{fault.count}", flush=True)
            passed += good
    count = sum(fault.count for fault in table)
    print(f"{passed}/{count}")
    return passed < count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
