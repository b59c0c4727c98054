"""Faults during training: dead loader workers, NaN, and exhausted memory."""

from __future__ import annotations

import resource
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fault_table import GIB, ONE_BY_ONE, READ, assert_continues, fault
from program import (
    Action,
    Harness,
    at_call,
    copy_folder,
    hash_tensors,
    losses,
    raise_signal,
    records,
    run_all,
    scale_timeout,
    session_processes,
    single_run,
)
from safetensors.torch import load_file, save_file

from trainer.training.checkpoint import Checkpoints


@fault("F15", "a loader worker is killed, or hangs", 2, [0])
def worker_dies(harness: Harness, out: Path, trial: int) -> None:
    def shorten_timeout() -> None:
        from trainer.training import loader

        loader.STALL_TIMEOUT = 2

    settings = ["hardware.workers=2"]
    stop = at_call(READ, 6, raise_signal((signal.SIGKILL, signal.SIGSTOP)[trial]))
    run = harness.start(out, *settings, setup=run_all(shorten_timeout, stop))
    result = run.wait()
    assert result.code == 74 and "train-00000" in result.output and "Traceback" not in result.output, result
    assert result.seconds < scale_timeout(10)
    assert session_processes(run.pid) == []
    assert_continues(harness, out, *settings)


def change_losses(call: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Action:
    """Returns a setup: `change` is applied to the losses of this forward pass, counted from 1."""

    def set_up() -> None:
        from trainer.training.predictor import Predictor

        original, count = Predictor.losses, 0

        def changed(self: Predictor, micro_batch: dict) -> torch.Tensor:
            nonlocal count
            count += 1
            losses = original(self, micro_batch)
            return change(losses) if count == call else losses

        Predictor.losses = changed

    return set_up


@fault("F16", "NaN in the base, after too large a step, in a gradient alone, in one micro-batch of four", 4, [3])
def not_finite(harness: Harness, out: Path, trial: int) -> None:
    settings, setup, step = ["save.every=1"], None, 3
    if trial == 0:
        model = copy_folder(harness.folder / "model", out)
        (weights,) = (model / "transformer").glob("*.safetensors")
        tensors = load_file(weights)
        tensors[min(tensors)] *= float("nan")
        save_file(tensors, weights, {"format": "pt"})
        settings, step = ["save.every=1", f"model.path={model}"], 1
    elif trial == 1:
        settings, step = ["save.every=1", "optimizer.lr=1e30"], 2
    elif trial == 2:
        # Adds 0, whose derivative is infinite.
        setup = change_losses(3, lambda losses: losses + (losses - losses).sqrt())
    else:
        settings.append(ONE_BY_ONE)
        setup = change_losses(10, lambda losses: losses * float("inf"))
    result = harness.run(out, *settings, setup=setup)
    assert result.code == 70 and f"step {step}" in result.output and "Traceback" not in result.output, result
    folder = single_run(out)
    (failed,) = records(folder, "failed")
    assert len(Counter(word for word in failed["reason"].replace(",", " ").split() if word.startswith("train-"))) == 4
    assert Checkpoints(folder / "checkpoints", 3).steps() == list(range(1, step)), "the bad step is not saved"
    if setup:
        assert_continues(harness, out, *settings)


@fault("F16", "NaN: up to k consecutive steps are skipped", 3, [2])
def skip_steps(harness: Harness, out: Path, trial: int) -> None:
    """Steps 2 and 3 are bad. One may be skipped; or two, in an attempt after one that stopped at step 2; or two."""
    setup = run_all(*(change_losses(step, lambda losses: losses * float("nan")) for step in (2, 3)))
    settings = ["save.every=1", "save.keep=9", "skip_nonfinite=2"]
    if trial == 0:
        result = harness.run(out, *settings, "skip_nonfinite=1", setup=setup)
        assert result.code == 70 and "At step 3" in result.output and "skip_nonfinite=2" in result.output
        assert Checkpoints(single_run(out) / "checkpoints", 9).steps() == [1, 2]
    elif trial == 1:
        assert harness.run(out, setup=setup).code == 70
        assert harness.run(out, *settings, setup=setup).code == 0
    else:
        result = harness.run(out, *settings, setup=setup)
        assert result.code == 0 and result.output.count("It is skipped") == 2
    folder = single_run(out)
    checkpoints = Checkpoints(folder / "checkpoints", 9)
    before, after = checkpoints.load(1), checkpoints.load(2)
    assert hash_tensors([before.weights, before.optimizer]) == hash_tensors([after.weights, after.optimizer])
    assert all(len(record["samples"]) == 4 for record in records(folder, "not_finite"))
    assert {record["step"] for record in records(folder, "not_finite")} == {2, 3}
    if trial:
        assert [step for step, name, _ in losses(folder) if name == "train/loss"] == [1, 4, 5]


def require_memory(bytes_per_sample: int) -> Action:
    """Returns a setup: a forward pass allocates this much for each sample, and the process has 3.5 GiB left."""

    def set_up() -> None:
        from trainer.training.predictor import Predictor

        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + 7 * GIB // 2, resource.RLIM_INFINITY))
        predict = Predictor.predict

        def allocate_and_predict(self: Predictor, latents: torch.Tensor, *others: Any) -> torch.Tensor:
            torch.empty(len(latents) * bytes_per_sample, dtype=torch.uint8)
            return predict(self, latents, *others)

        Predictor.predict = allocate_and_predict

    return set_up


@fault("F18", "memory for three samples; for less than one; none for the network", 3, [0, 2])
def out_of_memory(harness: Harness, out: Path, trial: int) -> None:
    if trial == 0:
        result = harness.run(out, setup=require_memory(GIB))
        folder = single_run(out)
        assert result.code == 0 and "from now on a forward pass has at most 2 sample(s)" in result.output
        assert len(records(folder, "warning")) == 1
        assert losses(folder) == [
            (step, name, pytest.approx(loss, abs=1e-6)) for step, name, loss in losses(harness.reference())
        ]
        return
    fail = at_call("trainer.training.session:build_network", 1, lambda: torch.empty(2**50, dtype=torch.uint8))
    result = harness.run(out, setup=require_memory(4 * GIB) if trial == 1 else fail)
    assert result.code == 71 and "Traceback" not in result.output, result
    # Remedies that only cost time come before those that start another run.
    remedies = ("gradient_checkpointing=true", "precision=bf16", "dataset.resolution=")
    positions = [result.output.index(remedy) for remedy in remedies]
    assert positions == sorted(positions)
    (failed,) = records(single_run(out), "failed")
    assert "precision=bf16" in failed["reason"]
    assert_continues(harness, out)
