"""`stage=check`: what it says about the length of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.__main__ import main

TWO_SAMPLES = ["dataset.pairs=2", "dataset.held_out=1", "tracking=none"]


def report(out: Path, capfd: pytest.CaptureFixture[str], *settings: str) -> str:
    assert main([*TWO_SAMPLES, f"out={out}", "stage=check", *settings]) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize(
    ("settings", "fitting"),
    [
        (["steps=3000", "batch=16"], ["steps=100", "batch=2"]),
        (["steps=500", "batch=1"], ["steps=200"]),
        (["steps=500", "batch=1", "lr_scheduler.warmup=300"], ["steps=301"]),
        (["epochs=201", "batch=2"], ["epochs=100"]),
    ],
)
def test_check_names_a_length_that_fits_the_dataset(
    settings: list[str], fitting: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    text = report(tmp_path, capfd, *settings)
    found = re.search(r"visit each of the 2 training samples [\d,]+ times, .*overfits; (.+) would visit", text)
    assert found and found[1] == " ".join(fitting)
    typed = {text.partition("=")[0]: text for text in [*settings, *fitting]}
    if "warmup" not in str(settings):
        assert "overfits" not in report(tmp_path, capfd, *typed.values())


@pytest.mark.parametrize("stage", ["check", "train"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lr_scheduler.warmup=1000"], "lr_scheduler.warmup=1000 does not fit into 2 steps"),
        (["lr_scheduler=cosine_restarts", "lr_scheduler.cycles=50"], "lr_scheduler.cycles=50 do not fit into the 2 "),
    ],
)
def test_a_schedule_that_does_not_fit_into_the_epochs_is_refused(
    stage: str, settings: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """How many steps the epochs have is known once the data are read."""
    assert main([*TWO_SAMPLES, f"out={tmp_path}", f"stage={stage}", "batch=1", "epochs=1", *settings]) == 64
    assert message in capfd.readouterr().err
    assert not list(tmp_path.glob("*/run.json"))
