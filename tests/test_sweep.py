"""Sweeps: members are processes under one MLflow run, failures are isolated, and the same command continues a sweep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlflow_helpers import view_state
from program import FAMILY

from trainer.config.groups import GROUPS
from trainer.dataset import image_grid
from trainer.sweep import pictures
from trainer.sweep.executors.local import LocalExecutor
from trainer.sweep.members import Member, State, set_varied
from trainer.sweep.ranking import csv_table, edge_advice, markdown_table
from trainer.sweep.sweep import sweep_id
from trainer.tracking.mlflow_store import connect
from trainer.training import reference_images

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
    tiny = GROUPS["model"][FAMILY].save_tiny_checkpoint(tmp_path_factory.mktemp("model"))
    return [f"model={FAMILY}", *tiny, *SMALL]


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts the program as from a terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer", f"out={out}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_end(process: subprocess.Popen[str]) -> tuple[int, str]:
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


def encoded_count(text: str) -> int:
    """Returns the number of cache entries that a member reports to have created."""
    (line,) = (line for line in text.splitlines() if line.startswith("cache: "))
    return sum(int(word) for word in line.split() if word.isdigit())


def test_a_refused_member_stops_no_other_and_mlflow_nests_the_members(settings: list[str], tmp_path: Path):
    code, text = wait_for_end(start(tmp_path, "-m", "method.rank=0,2", *settings))
    assert code == 1, text
    assert [member["status"] for member in members(tmp_path)] == ["failed", "finished"], text
    assert members(tmp_path)[0]["code"] == 64 and "method.rank=0" in members(tmp_path)[0]["reason"]

    client, experiment = connect(f"sqlite:///{tmp_path / 'mlflow.db'}", "trainer")
    runs = client.search_runs([experiment])
    (top,) = (run for run in runs if "trainer.sweep" in run.data.tags)
    (child,) = (run for run in runs if run != top and run.info.status == "FINISHED")
    assert len(runs) == 2 and child.data.tags["mlflow.parentRunId"] == top.info.run_id
    assert top.info.status == "FAILED" and top.info.run_name.startswith("sweep rank=0,2")
    assert top.data.metrics["val/loss"] == members(tmp_path)[1]["best_loss"]
    artifacts = {file.path for file in client.list_artifacts(top.info.run_id)}
    assert artifacts >= {"ranking.csv", "ranking.md", "samples.png"}
    description = top.data.tags["mlflow.note.content"]
    for part in (
        "**Best: rank=2**",
        "| place | member | method.rank |",
        "#/compare-runs?",
        "get-artifact?path=samples.png",
    ):
        assert part in description

    assert f"viewStateShareKey={top.info.run_id}" in text
    state = view_state(client.get_experiment(experiment).tags[f"mlflow.sharedViewState.{top.info.run_id}"])
    assert state["searchFilter"] == f"tags.mlflow.parentRunId = '{top.info.run_id}'"
    assert "params.`method.rank`" in state["selectedColumns"]


@pytest.mark.slow
def test_a_signal_stops_the_sweep_and_the_same_command_continues_it(settings: list[str], tmp_path: Path):
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
    code, text = wait_for_end(process)
    assert code == 143, text
    assert [member["status"] for member in members(tmp_path)] == ["stopped", "waiting", "waiting"] and set(
        logs(tmp_path)
    ) == {1}
    assert "saved at step" in logs(tmp_path)[1]

    code, text = wait_for_end(start(tmp_path, *many))
    assert code == 0 and "continuing at step" in logs(tmp_path)[1], text
    assert [member["status"] for member in members(tmp_path)] == ["finished"] * 3
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/weights.safetensors")}
    logs_before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweeps/*/*.log")}
    code, text = wait_for_end(start(tmp_path, *many))
    assert code == 0 and "is finished (3 members)" in text and "val/loss best" in text and "started" not in text, text
    assert logs_before == {path: path.stat().st_mtime_ns for path in logs_before}
    assert weights == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/weights.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_killed_member_stops_no_other_and_runs_again(number: int, settings: list[str], tmp_path: Path):
    many = ("-m", "seed=1,2", *settings, "steps=30", "evaluation.every=30", "tracking=none")
    process = start(tmp_path, *many)
    wait(lambda: list(tmp_path.glob("*/lock")), process)
    os.kill(int(next(tmp_path.glob("*/lock")).read_text().split()[1]), number)
    code, text = wait_for_end(process)
    assert code == 1 and f"killed by {number.name}" in text, text
    assert [member["status"] for member in members(tmp_path)] == ["failed", "finished"]
    if number == signal.SIGABRT:
        assert "Fatal Python error: Aborted" in logs(tmp_path)[1]
    code, text = wait_for_end(start(tmp_path, *many))
    assert code == 0 and [member["status"] for member in members(tmp_path)] == ["finished"] * 2, text


@pytest.mark.slow
def test_members_are_nested_and_ranked_and_fill_the_cache_once(settings: list[str], tmp_path: Path):
    code, text = wait_for_end(start(tmp_path, "-m", "optimizer.lr=1e-4,1e-2", "method.rank=4,16", *settings))
    assert code == 0, text
    client, experiment = connect(f"sqlite:///{tmp_path / 'mlflow.db'}", "trainer")
    runs = client.search_runs([experiment])
    (top,) = (run for run in runs if "trainer.sweep" in run.data.tags)
    assert [run.data.tags.get("mlflow.parentRunId") for run in runs if run != top] == [top.info.run_id] * 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {file.path for file in client.list_artifacts(top.info.run_id)} >= {"heat_map.png", "samples.png"}
    table = [line.split() for line in text.splitlines() if line[:1] in "1234" and line[1:2] == " "]
    losses = [float(row[4]) for row in table]
    assert len(losses) == 4 and losses == sorted(losses)
    assert encoded_count(logs(tmp_path)[1]) > 0 and [encoded_count(logs(tmp_path)[i]) for i in (2, 3, 4)] == [0, 0, 0]


@pytest.mark.slow
def test_concurrent_members_fill_the_cache_once(settings: list[str], tmp_path: Path):
    code, text = wait_for_end(start(tmp_path, "-m", "seed=1,2", *settings, "tracking=none", "hydra.launcher.slots=2"))
    assert code == 0, text
    counts = sorted(encoded_count(log) for log in logs(tmp_path).values())
    # The other member waits, or starts after the cache is filled. It creates nothing in either case.
    assert counts[0] == 0 and counts[1] == len(list(tmp_path.glob("cache/*/*/*.safetensors")))


@pytest.mark.slow
def test_a_named_sweep_needs_no_multirun_flag(settings: list[str], tmp_path: Path):
    code, text = wait_for_end(start(tmp_path, "sweep=lr_x_rank", *settings, "method.alpha=0", "tracking=none"))
    assert code == 1 and len(members(tmp_path)) == 9, text
    assert all("method.alpha=0" in member["reason"] for member in members(tmp_path))


# Without processes


def member(number: int, text: str, **fields: object) -> Member:
    return Member(number, text.split(), **fields)


def test_the_sweep_id_ignores_the_output_folder_hardware_and_tracking():
    overrides = ["method.rank=4,16", "optimizer.lr=1e-4,1e-3"]
    same = [
        *reversed(overrides),
        "out=elsewhere",
        "hardware=cpu",
        "hardware.workers=2",
        "tracking=none",
        "tracking.uri=null",
    ]
    assert sweep_id(overrides, {}) == sweep_id(same, {})
    assert (
        sweep_id(overrides, {})
        != sweep_id([*overrides, "seed=1"], {})
        != sweep_id([*overrides, "seed=1"], {"params": {"a": "1,2"}})
    )


def test_the_ranking_shows_varied_settings_and_lists_members_without_loss_last():
    finished = {"status": State.FINISHED, "last_loss": 0.5, "psnr": 20.0, "minutes": 1.0, "folder": "runs/x"}
    all_members = [
        member(1, "method.rank=4 seed=1", best_loss=0.4, **finished),
        member(
            2,
            "method.rank=8 seed=1",
            status=State.FAILED,
            code=70,
            reason="the loss is not finite",
            log="2.log",
            best_loss=0.1,
        ),
        member(3, "method.rank=16 seed=1", best_loss=0.3, **finished),
        member(4, "method.rank=32 seed=1", best_loss=float("nan"), **finished),
    ]
    set_varied(all_members)
    assert all_members[0].varied == {"method.rank": "4"}
    rows = markdown_table(all_members).splitlines()
    assert rows[0].startswith("| place | member | method.rank |")
    assert [row.split("|")[1:4] for row in rows[2:6]] == [
        [" 1 ", " 3 ", " 16 "],
        [" 2 ", " 1 ", " 4 "],
        ["  ", " 2 ", " 8 "],
        ["  ", " 4 ", " 32 "],
    ]
    assert rows[-1] == "- member 2, method.rank=8: the loss is not finite (log `2.log`)"
    assert csv_table(all_members).splitlines()[1].startswith("1,3,16,0.3,0.5,20.0,1.0,finished,")


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["lr=1e-4 rank=64", "lr=1e-3 rank=16"], "lr=1e-4 is the lowest tried and rank=64 is the highest tried"),
        (["lr=1e-4 rank=64", "lr=1e-3 rank=16"], "-m lr=1e-05,1e-4 rank=64,256"),
        (["dropout=0.2", "dropout=0", "dropout=0.1"], "-m dropout=0.2,0.3"),
        (["rank=2", "rank=1", "rank=8"], None),
        (["rank=1", "rank=8"], None),  # there is no lower rank
        (["dropout=0", "dropout=0.1"], None),
        (["seed=3", "seed=1"], None),
        (["optimizer=adamw", "optimizer=sgd"], None),
    ],
)
def test_the_summary_says_how_to_widen_a_grid_with_the_best_member_at_its_edge(
    overrides: list[str], advice: str | None
):
    ranked = [
        member(number, text, status=State.FINISHED, best_loss=float(number)) for number, text in enumerate(overrides)
    ]
    set_varied(ranked)
    assert (advice in (edge_advice(ranked) or "")) if advice else edge_advice(ranked) is None


def test_samples_show_control_and_target_and_say_which_members_they_show(tmp_path: Path):
    def pixels(value: int) -> np.ndarray:
        return np.full((8, 8, 3), value, np.uint8)

    all_members = []
    for number in range(1, 11):
        folder = tmp_path / f"run-{number}"
        for sample in (1, 2):
            image_grid.save_png(folder / f"pictures/step-00000002/{sample}.png", pixels(10 * number))
            reference_images.save(folder, sample, {"control": pixels(200), "target": pixels(250)})
        fields = {"status": State.FINISHED, "best_loss": 1 / number, "folder": str(folder)}
        all_members.append(member(number, f"seed={number}", **fields))
    set_varied(all_members)
    pictures.draw_samples(tmp_path, all_members)
    image = image_grid.load_png(tmp_path / "samples.png")
    cell = image_grid.MIN_SIDE + 4
    colors = [int(image[100, 20 + cell * column].mean()) for column in range(10)]
    assert colors == [200, 250, 100, 90, 80, 70, 60, 50, 40, 30]
    assert pictures.describe_shown(all_members).startswith("The best 8 of 10")


def test_members_end_with_a_killed_sweep_and_the_next_one_waits_for_them(tmp_path: Path):
    log, executor = tmp_path / "1.log", LocalExecutor()
    member_script = (
        "import signal, sys, time\n"
        "from trainer.sweep.members import end_with_sweep\n"
        "def stop(*_): time.sleep(1); print('saved', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop); end_with_sweep(); print('trains', flush=True); time.sleep(120)\n"
    )
    sweep_script = (
        "import os, sys, time; from pathlib import Path; from trainer.sweep.executors.local import LocalExecutor\n"
        "executor = LocalExecutor()\n"
        "executor.start([sys.executable, '-c', sys.argv[1]], dict(os.environ), Path(sys.argv[2])); time.sleep(120)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    sweep = subprocess.Popen([sys.executable, "-c", sweep_script, member_script, str(log)], env=environment)
    wait(lambda: log.exists() and "trains" in log.read_text(), sweep)
    sweep.kill()
    sweep.wait()
    command = [sys.executable, "-c", "print('second')"]
    assert executor.start(command, environment, log) is None
    deadline = time.monotonic() + 60
    while (handle := executor.start(command, environment, log)) is None:
        text = log.read_text()
        assert text.startswith("trains") and time.monotonic() < deadline
        time.sleep(0.02)
    while executor.poll(handle) is None:
        time.sleep(0.02)
    assert log.read_text() == "second\n"


def test_the_local_executor_shares_the_machine_and_reports_how_members_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    executor = LocalExecutor(slots=2)
    script = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.exit(int(sys.argv[1]))"
    sleeper = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(60)"
    logs = [tmp_path / "1.log", tmp_path / "2.log"]
    first = executor.start([sys.executable, "-c", script, "7"], dict(os.environ), logs[0])
    second = executor.start([sys.executable, "-c", sleeper], dict(os.environ), logs[1])
    while (code := executor.poll(first)) is None or not logs[1].read_text():
        time.sleep(0.02)
    assert code == 7 and executor.poll(second) is None
    assert [log.read_text().strip() for log in logs] == ["3", "5"]
    executor.stop(second, signal.SIGKILL)
    while (code := executor.poll(second)) is None:
        time.sleep(0.02)
    assert code == -signal.SIGKILL
