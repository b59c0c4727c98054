"""Warnings about the course of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trainer
from trainer.config.compose import compose_config, to_run
from trainer.config.schema import Run
from trainer.core.errors import UsageError
from trainer.core.rng import uniform
from trainer.tracking.journal import read_records
from trainer.training.alerts import Alerts


def run_of(*overrides: str) -> Run:
    return to_run(compose_config([*overrides]))


def watch(run: Run, steps: int = 100, every: int = 25, records: tuple[dict, ...] = (), **course: Any) -> dict[str, str]:
    """Returns the alerts of a run whose values are functions of the step, by kind."""
    usual = {
        "loss": lambda step: 0.5 + 0.1 * uniform("loss", step),
        "held_out": lambda step: 1.0 - step / 200,
        "grad_norm": lambda step: 1.0,
        "speed": lambda step: 2.0,
        "memory": lambda step: 4.0,
    } | course
    alerts, found, best = Alerts(run, steps, 10.0, records), [], float("inf")
    for step in range(steps + 1):
        if step:
            names = {"loss": "train/loss", "grad_norm": "train/grad_norm", "speed": "perf/steps_per_second"}
            values = {key: usual[name](step) for name, key in names.items()}
            found += alerts.after_step(step, values | {"system/memory_gib": usual["memory"](step)})
        if step % every == 0:
            loss = usual["held_out"](step)
            best = min(best, loss)
            found += alerts.after_evaluation(step, loss, best)
    assert len({alert.kind for alert in found}) == len(found), "each kind is given once"
    return {alert.kind: alert.text for alert in found}


def test_an_ordinary_run_gives_no_alert():
    assert watch(run_of(), held_out=lambda step: 0.56 - step / 1000) == {}


@pytest.mark.parametrize(
    ("kind", "course", "words"),
    [
        ("gap", {"held_out": lambda step: 0.7 - step / 1e4}, "above the training loss"),
        ("rise", {"held_out": lambda step: 0.5 + 0.0016 * abs(step - 50)}, "has risen above its lowest value 0.5000"),
        ("grad_norm", {"grad_norm": lambda step: 30.0}, "the gradient norm is 30.0 on average"),
        ("slowdown", {"speed": lambda step: 2.0 if step < 50 else 0.5}, "after 2 before"),
        ("memory", {"memory": lambda step: 9.5}, "has used 9.5 of 10.0 GiB"),
        ("standstill", {"held_out": lambda step: 0.55}, "nothing moves. Type optimizer.lr=0.02"),
    ],
)
def test_each_alert_names_what_happens_and_the_remedy(kind: str, course: dict, words: str):
    base = {"held_out": lambda step: 0.56 - step / 1000}
    found = watch(run_of(), **base | course)
    assert list(found) == [kind] and words in found[kind]
    assert watch(run_of(f"alerts.{kind}=null"), **base | course) == {}


def test_one_step_out_of_line_gives_no_alert():
    held_out = {"held_out": lambda step: 0.56 - step / 1000}
    assert watch(run_of(), grad_norm=lambda step: 150.0 if step == 60 else 1.0, **held_out) == {}
    assert watch(run_of(), speed=lambda step: 0.1 if step == 60 else 2.0, **held_out) == {}


def test_a_resumed_run_repeats_no_alert_and_remembers_the_loss_before_training():
    given = ({"kind": "warning", "alert": "grad_norm", "text": ""},)
    before = ({"kind": "metrics", "step": 0, "values": {"val/loss": 9.0}},)
    course = {"grad_norm": lambda step: 30.0, "held_out": lambda step: 0.55}
    assert set(watch(run_of(), records=given, **course)) == {"standstill"}
    assert set(watch(run_of(), records=given + before, **course)) == set()


def test_a_negative_limit_is_refused():
    with pytest.raises(UsageError, match="alerts.gap=-1 is below 0; type a number of 0 or more such as 0.05"):
        run_of("alerts.gap=-1")


def test_an_alert_is_printed_and_written_to_the_journal(tmp_path: Path, capsys: pytest.CaptureFixture):
    settings = ["steps=22", "batch=1", "evaluation.every=22", "evaluation.images=0", "dataset.pairs=4"]
    more = ["dataset.held_out=1", "tracking=none", f"out={tmp_path}", "alerts.grad_norm=0", "alerts.gap=null"]
    result = trainer.train([*settings, *more, "export.formats=[]"])
    records = [record for _, record in read_records(result.folder / "journal.jsonl")]
    (alert,) = (record for record in records if "alert" in record)
    assert alert["alert"] == "grad_norm" and "A lower optimizer.lr" in alert["text"]
    assert alert["text"] in capsys.readouterr().out
