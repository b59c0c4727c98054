"""The benchmark: the bare loop trains the same parameters as the program, and contenders take turns."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from bench import bare, process, race, speed
from bench.inputs import MINI
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model.flux_kontext import FluxKontext

STEPS, TURNS = 3, 4


def test_the_bare_loop_is_short_and_trains_the_same_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(Path(bare.__file__).read_text().splitlines()) <= 60
    family = FluxKontext(path=str(MINI))
    network = family.load_network(torch.float32)
    Lora(rank=16, alpha=16.0).attach(network, family.target_modules, seed=0)
    tensors = {"latents": (5, 8, 4, 4), "control": (5, 8, 4, 4), "prompt": (5, 12, 64), "pooled": (5, 64)}
    save_file({name: torch.randn(shape) for name, shape in tensors.items()}, tmp_path / "tensors.safetensors")
    updated = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: updated.append(parameters))
    assert list(bare.train(MINI, tmp_path / "tensors.safetensors", 2, 2)) == [1, 2]
    assert sorted(p.shape for p in updated[0]) == sorted(p.shape for p in trainable_parameters(network).values())


def test_contenders_take_turns_and_a_failure_ends_the_race():
    log = []

    def contender(name: str):
        def compete(lap):
            while True:
                log.append(name)
                lap()

        return compete

    found = race.race({"a": contender("a"), "b": contender("b")}, STEPS, TURNS)
    assert "".join(log) == ("a" * STEPS + "b" * STEPS) * (TURNS + race.WARM_UP)
    assert {name: len(turns) for name, turns in found.items()} == {"a": TURNS, "b": TURNS}

    def fails(lap):
        lap()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        race.race({"a": contender("a"), "b": fails}, STEPS, TURNS)


def test_measured_memory_is_that_of_the_command_alone():
    small, large = (process.run([sys.executable, "-c", f"bytearray({size} * 2**20)"]).memory for size in (0, 200))
    assert small < 50 < psutil.Process().memory_info().rss / 2**20
    assert 190 < large - small < 210


def test_the_new_table_replaces_the_old_one():
    report = speed.REPORT.read_text()
    assert report.count(speed.MARKER) == 2
    once = speed.replace_table(report, ["| old |"])
    assert speed.replace_table(once, ["| new |"]) == once.replace("| old |", "| new |")
