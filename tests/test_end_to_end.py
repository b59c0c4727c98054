"""The whole program as a user has it: the default run, and what can be done with it afterwards."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("end to end")


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the default run has been run: `python -m trainer`, nothing else."""
    place = tmp_path_factory.mktemp("user")
    done = program(cwd=place)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def folder(place: Path) -> Path:
    (found,) = [path.parent for path in (place / "runs").glob("*/run.json")]
    return found


def journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def values(folder: Path, name: str) -> dict[int, float]:
    return {record["step"]: record["values"][name] for record in journal(folder) if name in record.get("values", {})}


def test_the_default_run_goes_from_wrong_to_right(folder: Path):
    psnr, loss = values(folder, "val/psnr"), values(folder, "val/loss")
    assert json.loads((folder / "run.json").read_text())["settings"]["dataset"]["held_out"] >= 32
    assert psnr[0] < 15, "the base must not know the edit already"
    assert psnr[200] > 27
    assert loss[200] < loss[0] / 10


def test_everything_a_run_promises_lies_in_its_folder(folder: Path):
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 200)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(201))
    assert all(float(row["train/loss"]) > 0 and float(row["train/lr"]) > 0 for row in rows[1:])
    assert (folder / "training_curves.png").stat().st_size > 10_000
    assert len(list(folder.glob("pictures/step-*/*-strip.png"))) == 5 * 4
    assert (folder / "export" / "pytorch_lora_weights.safetensors").stat().st_size > 10_000
    assert (folder / "log.txt").read_text()
    assert not list(folder.rglob(".partial-*"))


def test_mlflow_has_the_run_with_its_curves_settings_and_pictures(place: Path, folder: Path):
    # In a process of its own: importing mlflow starts threads, and tests beside this one fork.
    script = f"""
import json, mlflow
client = mlflow.MlflowClient("sqlite:///{place}/runs/mlflow.db")
(experiment,) = [e for e in client.search_experiments() if e.name == "trainer"]
(run,) = client.search_runs([experiment.experiment_id])
history = {{k: len(client.get_metric_history(run.info.run_id, k)) for k in run.data.metrics}}
images = [f.path for f in client.list_artifacts(run.info.run_id, "images")]
print(json.dumps([run.info.status, run.info.run_name, run.data.params, run.data.tags, run.data.metrics, history, images]))
"""
    status, name, params, tags, metrics, history, images = json.loads(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()[
            -1
        ]
    )
    assert status == "FINISHED"
    assert name.startswith("defaults")
    assert params["method.rank"] == "16" and float(params["optimizer.lr"]) > 0 and params["steps"] == "200"
    assert not any(key.startswith(("hardware", "tracking", "evaluation", "out")) for key in params)
    assert "hardware.device=auto" in tags["attempt.1.settings"] and "torch " in tags["attempt.1.versions"]
    assert tags["identity"] == folder.name
    assert history["train/loss"] == 200 and history["val/loss"] == 5
    assert metrics["val/psnr"] == pytest.approx(values(folder, "val/psnr")[200])
    assert {"train/grad_norm", "train/lr", "perf/steps_per_second", "system/memory_gib"} <= set(metrics)
    assert len([path for path in images if path.endswith(".png")]) == 20


def test_the_same_command_says_that_the_run_is_finished(place: Path, folder: Path):
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lock", "log.txt")
    }
    again = program(cwd=place)
    assert again.returncode == 0
    assert "is finished" in again.stdout and "fresh=true" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_finished_run_can_be_evaluated_sampled_and_exported(place: Path, folder: Path):
    evaluated = program("stage=evaluate", f"run={folder.name}", cwd=place)
    assert evaluated.returncode == 0, evaluated.stderr
    psnr = float(re.search(r"val/psnr ([\d.]+) at step", evaluated.stdout)[1])
    assert psnr == pytest.approx(max(values(folder, "val/psnr").values()), abs=0.5)
    control = next(folder.glob("pictures/step-00000000/1.png"))
    drawn = program(
        "stage=sample", f"run={folder.name}", "sample.prompts=[make it night]", f"sample.images=[{control}]", cwd=place
    )
    assert drawn.returncode == 0, drawn.stderr
    assert len(list(folder.glob("samples/*/*.png"))) == 1


def test_check_prints_what_would_be_trained_and_makes_no_folder(tmp_path: Path):
    checked = program("stage=check", "method.rank=4", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert re.search(r"identity +[0-9a-f]{12}", checked.stdout)
    assert re.search(r"20,480 of them trainable", checked.stdout)
    assert not list(tmp_path.glob("runs/*/run.json"))
