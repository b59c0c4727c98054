"""Sweeps: each member a process, all under one MLflow run, one that fails takes no other along, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import model, sweep
from trainer.tracking import MLflow, NoTracking, Sink, curves, links, page
from trainer.tracking.sink import connect

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "sample.steps=1",
    "evaluation.images=2",
    "hardware=cpu",
    "dataset.pairs=8",
    "dataset.held_out=2",
    "batch=4",
    "steps=2",
    "evaluation.every=2",
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    name, kind = next(iter(model.families().items()))
    return [f"model={name}", *kind.tiny(tmp_path_factory.mktemp("model")), *SMALL]


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """The sweep as it is typed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer", f"out={out}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    text, _ = process.communicate(timeout=240)
    return process.returncode, text


def members(out: Path) -> list[dict]:
    (path,) = out.glob("sweeps/*/sweep.json")
    return json.loads(path.read_text())["members"]


def wait(until: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def logs(out: Path) -> dict[int, str]:
    return {int(path.stem): path.read_text() for path in out.glob("sweeps/*/*.log")}


def made(text: str) -> int:
    """How many cache entries a member said to have made."""
    (line,) = (line for line in text.splitlines() if line.startswith("cache: "))
    return sum(int(word) for word in line.split() if word.isdigit())


def test_a_refused_member_does_not_stop_the_rest_which_mlflow_shows_under_the_sweep(
    settings: list[str], tmp_path: Path
):
    code, text = ended(start(tmp_path, "-m", "method.rank=0,2", *settings))
    assert code == 1, text
    assert [member["status"] for member in members(tmp_path)] == ["failed", "finished"], text
    assert members(tmp_path)[0]["code"] == 64 and "method.rank=0" in members(tmp_path)[0]["reason"]

    client, experiment = connect(f"sqlite:///{tmp_path / 'mlflow.db'}", "trainer")
    runs = client.search_runs([experiment])
    (top,) = (run for run in runs if "trainer.sweep" in run.data.tags)
    assert top.info.status == "FAILED" and top.info.run_name.startswith("sweep rank=0,2")
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs if run != top} == {top.info.run_id} and len(
        runs
    ) == 2
    assert all(run.info.status == "FINISHED" for run in runs if run != top)
    assert (
        "| rank | method.rank |" in top.data.tags["mlflow.note.content"]
        and "#/compare-runs?" in top.data.tags["mlflow.note.content"]
    )
    assert {file.path for file in client.list_artifacts(top.info.run_id)} >= {
        "ranking.csv",
        "ranking.md",
        "samples.png",
    }

    assert f"viewStateShareKey={top.info.run_id}" in text
    state = json.loads(client.get_experiment(experiment).tags[f"mlflow.sharedViewState.{top.info.run_id}"])
    assert (
        state["searchFilter"] == f"tags.mlflow.parentRunId = '{top.info.run_id}'"
        and "params.`method.rank`" in state["selectedColumns"]
    )
    assert (
        "**Best: rank=2**" in top.data.tags["mlflow.note.content"]
        and "get-artifact?path=samples.png" in top.data.tags["mlflow.note.content"]
    )
    assert top.data.metrics["val/loss"] == members(tmp_path)[1]["best_loss"]


@pytest.mark.slow
def test_after_a_signal_the_running_member_saves_later_ones_never_start_and_the_same_command_goes_on(
    settings: list[str], tmp_path: Path
):
    many = ("-m", "seed=1,2,3", *settings, "steps=60", "evaluation.every=60", "tracking=none")
    process = start(tmp_path, *many)
    wait(
        lambda: (
            list(tmp_path.glob("*/journal.jsonl"))
            and "train/loss" in next(tmp_path.glob("*/journal.jsonl")).read_text()
        ),
        process,
    )
    process.send_signal(signal.SIGTERM)
    code, text = ended(process)
    assert code == 143, text
    assert [member["status"] for member in members(tmp_path)] == ["stopped", "waiting", "waiting"] and set(
        logs(tmp_path)
    ) == {1}
    assert "saved at step" in logs(tmp_path)[1]

    code, text = ended(start(tmp_path, *many))
    assert code == 0 and "continuing at step" in logs(tmp_path)[1], text
    assert [member["status"] for member in members(tmp_path)] == ["finished"] * 3
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/weights.safetensors")}
    code, text = ended(start(tmp_path, *many))
    assert code == 0 and all("is finished" in log for log in logs(tmp_path).values()), text
    assert weights == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/weights.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_killed_member_does_not_stop_the_rest_and_is_done_again(number: int, settings: list[str], tmp_path: Path):
    many = ("-m", "seed=1,2", *settings, "steps=30", "evaluation.every=30", "tracking=none")
    process = start(tmp_path, *many)
    wait(lambda: list(tmp_path.glob("*/lock")), process)
    os.kill(int(next(tmp_path.glob("*/lock")).read_text().split()[1]), number)
    code, text = ended(process)
    assert code == 1 and f"killed by {number.name}" in text, text
    assert [member["status"] for member in members(tmp_path)] == ["failed", "finished"]
    if number == signal.SIGABRT:
        assert "Fatal Python error: Aborted" in logs(tmp_path)[1]
    code, text = ended(start(tmp_path, *many))
    assert code == 0 and [member["status"] for member in members(tmp_path)] == ["finished"] * 2, text


@pytest.mark.slow
def test_four_members_are_nested_under_one_run_and_ranked_and_fill_the_cache_once(settings: list[str], tmp_path: Path):
    code, text = ended(start(tmp_path, "-m", "optimizer.lr=1e-4,1e-2", "method.rank=4,16", *settings))
    assert code == 0, text
    client, experiment = connect(f"sqlite:///{tmp_path / 'mlflow.db'}", "trainer")
    runs = client.search_runs([experiment])
    (top,) = (run for run in runs if "trainer.sweep" in run.data.tags)
    assert [run.data.tags.get("mlflow.parentRunId") for run in runs if run != top] == [top.info.run_id] * 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {file.path for file in client.list_artifacts(top.info.run_id)} >= {"heat_map.png", "samples.png"}
    table = [line.split() for line in text.splitlines() if line[:1] in "1234" and line[1:2] == " "]
    losses = [float(row[3]) for row in table]
    assert len(losses) == 4 and losses == sorted(losses)
    assert made(logs(tmp_path)[1]) > 0 and [made(logs(tmp_path)[i]) for i in (2, 3, 4)] == [0, 0, 0]


@pytest.mark.slow
def test_members_side_by_side_fill_the_cache_once(settings: list[str], tmp_path: Path):
    code, text = ended(start(tmp_path, "-m", "seed=1,2", *settings, "tracking=none", "hydra.launcher.slots=2"))
    assert code == 0, text
    counts = sorted(made(log) for log in logs(tmp_path).values())
    # A member that came late finds all there; one that came early waits, and makes nothing either.
    assert counts[0] == 0 and counts[1] == len(list(tmp_path.glob("cache/*/*/*.safetensors")))


@pytest.mark.slow
def test_a_recipe_of_a_sweep_needs_no_flag(settings: list[str], tmp_path: Path):
    code, text = ended(start(tmp_path, "sweep=lr_x_rank", *settings, "method.alpha=0", "tracking=none"))
    assert code == 1 and len(members(tmp_path)) == 9, text
    assert all("method.alpha=0" in member["reason"] for member in members(tmp_path))


# Without processes


def member(number: int, text: str, **known: object) -> sweep.Member:
    return sweep.Member(number, text.split(), **known)


def test_the_sweep_is_known_by_what_is_asked_and_not_by_where_it_goes_or_how_fast():
    asked = ["method.rank=4,16", "optimizer.lr=1e-4,1e-3"]
    same = [
        *reversed(asked),
        "out=elsewhere",
        "hardware=cpu",
        "hardware.workers=2",
        "tracking=none",
        "tracking.uri=null",
    ]
    assert sweep.identity(asked, {}) == sweep.identity(same, {})
    assert (
        sweep.identity(asked, {})
        != sweep.identity([*asked, "seed=1"], {})
        != sweep.identity([*asked, "seed=1"], {"params": {"a": "1,2"}})
    )


def test_the_ranking_shows_what_varies_and_puts_those_without_a_loss_last():
    done = {"status": sweep.FINISHED, "last_loss": 0.5, "psnr": 20.0, "minutes": 1.0, "folder": "runs/x"}
    all_of_them = [
        member(1, "method.rank=4 seed=1", best_loss=0.4, **done),
        member(
            2,
            "method.rank=8 seed=1",
            status=sweep.FAILED,
            code=70,
            reason="the loss is not finite",
            log="2.log",
            best_loss=0.1,
        ),
        member(3, "method.rank=16 seed=1", best_loss=0.3, **done),
        member(4, "method.rank=32 seed=1", best_loss=float("nan"), **done),
    ]
    sweep._vary(all_of_them)
    assert all_of_them[0].varied == {"method.rank": "4"}
    rows = sweep.ranking(all_of_them).splitlines()
    assert [row.split("|")[1:3] for row in rows[2:6]] == [
        [" 1 ", " 16 "],
        [" 2 ", " 4 "],
        ["  ", " 8 "],
        ["  ", " 32 "],
    ]
    assert rows[-1] == "- method.rank=8: the loss is not finite (log `2.log`)"
    assert sweep.ranking_csv(all_of_them).splitlines()[1].startswith("1,3,16,0.3,0.5,20.0,1.0,finished,")


def test_without_mlflow_nothing_of_it_is_asked():
    assert links(NoTracking(), Sink(), []) == {} == links(MLflow(), Sink(), [])


def test_the_command_that_serves_the_pages_is_told_with_what_is_not_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert page(NoTracking(), Path("runs")) is None
    assert page(MLflow(uri="http://host:5000"), Path("runs")) == "http://host:5000"
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setattr(sys, "executable", str(Path(sys.executable).parent / "python"))
    assert page(MLflow(), Path("runs")) == "python -m trainer.tracking.ui"
    told = page(MLflow(experiment="two words", uri="sqlite:///a.db"), Path("/other"))
    assert told == "python -m trainer.tracking.ui --out /other --uri sqlite:///a.db --experiment 'two words'"
    # Where it is not the python of the shell it is named.
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    assert page(MLflow(), Path("runs")) == f"{tmp_path}/bin/python -m trainer.tracking.ui"
    monkeypatch.chdir(tmp_path)
    assert page(MLflow(), Path("runs")) == "bin/python -m trainer.tracking.ui"


def test_a_heat_map_leaves_unknown_places_empty(tmp_path: Path):
    picture = curves.draw_heat_map(
        tmp_path / "map.png", "loss", ("rank", [4, 16]), ("lr", [1e-4, 1e-3]), [[0.2, float("nan")], [0.1, 0.3]]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    nothing = [[float("nan")] * 2] * 2
    assert curves.draw_heat_map(
        tmp_path / "empty.png", "loss", ("rank", [4, 16]), ("lr", [1e-4, 1e-3]), nothing
    ).exists()
