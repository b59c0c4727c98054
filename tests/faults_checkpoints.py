"""Faults of saving and resuming: killed saves, damaged checkpoints, full disks, other settings and data."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path

from fault_table import AVERAGE, FORWARD, SAVE, assert_continues, fault, stop_run
from PIL import Image
from program import (
    Action,
    Harness,
    at_call,
    copy_folder,
    fingerprint,
    kill_within,
    last_logged_step,
    newest_checkpoint,
    records,
    run_all,
    scale_timeout,
    single_run,
    snapshot,
)
from safetensors.torch import load_file, save_file

from trainer.core import rng
from trainer.training.checkpoint import Checkpoints
from trainer.training.checkpoint_format import EMA, MANIFEST, OPTIMIZER, STATE, WEIGHTS

FILES = (WEIGHTS, OPTIMIZER, STATE, MANIFEST, EMA)


@fault("F01", "SIGKILL at a random moment", 50, [15, 37])
def kill_at_random(harness: Harness, out: Path, trial: int) -> None:
    settings = ["save.every=1", "steps=8"]
    run = harness.start(out, *settings)
    # One moment in each fiftieth of a run, so that a few trials are spread over the whole run too.
    time.sleep(harness.seconds(*settings) / 50 * (trial + rng.uniform("kill", trial)))
    run.signal(signal.SIGKILL)
    assert run.wait().code in (-signal.SIGKILL, 0)
    if list(out.glob("*/checkpoints")):
        folder = single_run(out)
        checkpoint = newest_checkpoint(folder)
        step = checkpoint.step if checkpoint else 0
        assert last_logged_step(folder) - step <= 1
        assert not checkpoint or {int(moments["step"]) for moments in checkpoint.optimizer["state"].values()} == {step}
    assert_continues(harness, out, *settings)


@fault("F02", "killed before any file operation of a save", 22, [9, 17])
def kill_in_save(harness: Harness, out: Path, trial: int) -> None:
    was_killed = is_killed_within(harness, out, "trainer.training.checkpoint:Checkpoints.save", trial)
    assert was_killed == (trial < 21), "each operation has a trial, and the last trial has no operation"


@fault("F02", "killed while the weights are written", 4, [])
def kill_in_write(harness: Harness, out: Path, trial: int) -> None:
    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, ((0, 1, 12_345, 25_000)[trial],) * 2)

    result = harness.run(out, setup=at_call(SAVE, 3, limit_file_size))
    assert result.code == -signal.SIGXFSZ and list(out.glob("*/checkpoints/.partial-*-step-00000004"))
    assert_continues(harness, out)


@fault("F07", "killed while the third of two checkpoints is deleted", 8, [])
def kill_in_retention(harness: Harness, out: Path, trial: int) -> None:
    was_killed = is_killed_within(harness, out, "trainer.training.checkpoint:Checkpoints._retain", trial)
    assert was_killed == (trial < 7)


def is_killed_within(harness: Harness, out: Path, where: str, trial: int) -> bool:
    """Returns whether the process was killed before the end of the fourth save or retention."""
    settings = ["save.every=1", "save.keep=2", AVERAGE]
    result = harness.run(out, *settings, setup=kill_within(where, 4, trial + 1))
    assert result.code in (-signal.SIGKILL, 0), result
    folder = single_run(out)
    checkpoints = Checkpoints(folder / "checkpoints", 2)
    if result.code:
        assert checkpoints.newest(set_aside=False).step in (3, 4)
        undamaged = [checkpoints.load(step) for step in checkpoints.steps()]
        assert len(undamaged) >= 2
    output = assert_continues(harness, out, *settings).output
    assert "damaged" not in output and not (folder / "quarantine").exists()
    return result.code != 0


def checkpoint_with_average(harness: Harness, out: Path) -> Path:
    """Returns the newest checkpoint of a stopped run that keeps a moving average."""
    template = harness.template("stopped", lambda folder: stop_run(harness, folder, 5, AVERAGE))
    return copy_folder(template, out) / "checkpoints" / "step-00000004"


@fault("F03", "a truncated file of the newest checkpoint", 20, [5])
def truncate_file(harness: Harness, out: Path, trial: int) -> None:
    folder = checkpoint_with_average(harness, out)
    path = folder / FILES[trial // 4]
    size = path.stat().st_size
    os.truncate(path, (0, 1, size // 2, size - 1)[trial % 4])
    output = assert_continues(harness, out, AVERAGE).output
    assert "step-00000004 is damaged" in output and "step 2 is used instead" in output
    assert (single_run(out) / "quarantine" / folder.name / path.name).stat().st_size < size


@fault("F04", "a flipped bit in a file of the newest checkpoint", 100, [6])
def flip_bit(harness: Harness, out: Path, trial: int) -> None:
    path = checkpoint_with_average(harness, out) / FILES[trial % 5]
    data = bytearray(path.read_bytes())
    data[rng.seed_for("byte", trial) % len(data)] ^= 1 << trial // 5 % 8
    path.write_bytes(data)
    assert "step-00000004 is damaged" in assert_continues(harness, out, AVERAGE).output
    assert (single_run(out) / "quarantine" / "step-00000004" / path.name).read_bytes() == data


@fault("F05", "an unfinished and an existing folder of the next step", 2, [0])
def next_step_exists(harness: Harness, out: Path, trial: int) -> None:
    checkpoints = stop_run(harness, out, 4) / "checkpoints"
    (checkpoints / ".partial-1-ab-step-00000004").mkdir()
    (checkpoints / ".partial-1-ab-step-00000004" / WEIGHTS).write_bytes(b"half")

    def create_next_step() -> None:
        if trial:
            copy_folder(checkpoints / "step-00000002", checkpoints / "new").rename(checkpoints / "step-00000004")
            (checkpoints / "new").rmdir()
        else:
            (checkpoints / "step-00000004").mkdir()
            (checkpoints / "step-00000004" / WEIGHTS).write_bytes(b"half")

    assert harness.run(out, setup=at_call(FORWARD, 1, create_next_step)).code == 0
    harness.assert_equals_reference(checkpoints.parent)
    assert Checkpoints(checkpoints, 1).steps() == [2, 4, 5]


@fault("F06", "a full disk during a save, for a while or forever", 2, [0])
def disk_full(harness: Harness, out: Path, trial: int) -> None:
    def limit_file_size(size: int) -> Action:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    # Smaller than the weights, and larger than all other files.
    setup = at_call(FORWARD, 3, limit_file_size(20_000))
    if trial == 0:
        lift_limit = limit_file_size(resource.RLIM_INFINITY)
        setup = run_all(setup, at_call("trainer.training.session:Session._evaluate_if_due", 6, lift_limit))
    result = harness.run(out, setup=setup)
    folder = single_run(out)
    assert "Could not" in result.output and "step-00000004" in result.output
    assert any("step-00000004" in record["text"] for record in records(folder, "warning"))
    saved, reference = (snapshot(run / "checkpoints" / "step-00000002") for run in (folder, harness.reference()))
    assert [data for _, data in saved.values()] == [data for _, data in reference.values()]
    if trial == 0:
        assert result.code == 0
        assert fingerprint(folder) == fingerprint(harness.reference())
        assert Checkpoints(folder / "checkpoints", 1).steps() == [2, 5]
    else:
        assert result.code == 74
        assert Checkpoints(folder / "checkpoints", 1).steps() == [2]
        assert_continues(harness, out)


@fault("F08", "every checkpoint damaged; a mistyped folder", 2)
def nothing_to_resume(harness: Harness, out: Path, trial: int) -> None:
    folder = stop_run(harness, out, 5)
    if trial == 0:
        for path in folder.glob(f"checkpoints/*/{WEIGHTS}"):
            os.truncate(path, 100)
        before = snapshot(folder / "checkpoints")
        result = harness.run(out)
        assert result.code == 65 and "step-00000002" in result.output and "step-00000004" in result.output
        assert snapshot(folder / "checkpoints") == before and not (folder / "quarantine").exists()
    else:
        before = snapshot(out)
        result = harness.run(out, f"resume={folder}x", "cache.path=null")
        assert result.code == 64 and f"{folder}x" in result.output and folder.name in result.output
        assert snapshot(out) == before
    assert result.seconds < scale_timeout(3)


@fault("F09", "resumed with other settings", 4, [0])
def other_settings(harness: Harness, out: Path, trial: int) -> None:
    folder = harness.reference()
    before = snapshot(folder)
    setting, difference = (
        ("method.rank=8", "method.rank: 16 -> 8"),
        ("optimizer.lr=0.5", "optimizer.lr: 0.0001 -> 0.5"),
        ("seed=7", "seed: 0 -> 7"),
        ("steps=4", "steps: 5 -> 4"),
    )[trial]
    result = harness.run(out, f"resume={folder}", setting)
    assert result.code == 64 and difference in result.output and result.output.count("\n") == 1
    assert snapshot(folder) == before and list(out.iterdir()) == []


@fault("F09", "the same command after the data or the base weights have changed", 2, [0])
def other_data(harness: Harness, out: Path, trial: int) -> None:
    data, model = out / "data", copy_folder(harness.folder / "model", out)
    data.mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (30 * i, 100, 200)).save(data / f"{i}.png")
    captions = [{"file_name": f"{i}.png", "text": f"photo {i}"} for i in range(8)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))
    settings = ["dataset=imagefolder", f"dataset.path={data}", "dataset.validation_fraction=0.3", f"model.path={model}"]
    folder = stop_run(harness, out, 4, *settings)
    before = snapshot(folder / "checkpoints")
    if trial == 0:
        captions[3]["text"] = "another photo"
        (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))
    else:
        (weights,) = (model / "transformer").glob("*.safetensors")
        tensors = load_file(weights)
        tensors[min(tensors)] += 1
        save_file(tensors, weights, {"format": "pt"})
    result = harness.run(out, *settings)
    assert result.code == 64 and "fresh=true" in result.output
    assert ("weights.transformer: ", "data: ")[trial == 0] in result.output
    assert snapshot(folder / "checkpoints") == before
    assert harness.run(out, *settings, "fresh=true").code == 0
    assert (out / f"{folder.name}-2" / "summary.json").exists()
