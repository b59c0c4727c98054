"""The whole program as users run it: the default training, and the stages after it."""

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


def run_program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `python -m trainer` in the folder `cwd`."""
    return subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the default training has run."""
    working_folder = tmp_path_factory.mktemp("user")
    trained = run_program(cwd=working_folder)
    assert trained.returncode == 0, trained.stderr
    return working_folder


@pytest.fixture(scope="module")
def folder(working_folder: Path) -> Path:
    """The run folder of the default training."""
    (path,) = (working_folder / "runs").glob("*/run.json")
    return path.parent


def metric(folder: Path, name: str) -> dict[int, float]:
    """Returns step -> value of a metric in the journal."""
    records = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return {record["step"]: record["values"][name] for record in records if name in record.get("values", {})}


def test_default_training_learns_the_edit(folder: Path):
    psnr, loss = metric(folder, "val/psnr"), metric(folder, "val/loss")
    assert json.loads((folder / "run.json").read_text())["settings"]["dataset"]["held_out"] >= 32
    assert psnr[0] < 15, "the base model must not know the edit"
    assert psnr[200] > 27
    assert loss[200] < loss[0] / 10


def test_run_folder_contains_all_files(folder: Path):
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


def test_mlflow_shows_curves_settings_and_images(working_folder: Path, folder: Path):
    # In a new process: importing mlflow starts threads, and other tests fork this process.
    script = f"""
import json, mlflow
client = mlflow.MlflowClient("sqlite:///{working_folder}/runs/mlflow.db")
(experiment,) = [e for e in client.search_experiments() if e.name == "trainer"]
(run,) = client.search_runs([experiment.experiment_id])
history = {{k: len(client.get_metric_history(run.info.run_id, k)) for k in run.data.metrics}}
images = [f.path for f in client.list_artifacts(run.info.run_id, "images")]
info, data = run.info, run.data
print(json.dumps([info.status, info.run_name, data.params, data.tags, data.metrics, history, images]))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    status, name, params, tags, metrics, history, images = json.loads(output.splitlines()[-1])
    assert status == "FINISHED"
    assert name.startswith("defaults")
    assert params["method.rank"] == "16" and float(params["optimizer.lr"]) > 0 and params["steps"] == "200"
    assert not any(key.startswith(("hardware", "tracking", "evaluation", "out")) for key in params)
    assert "hardware.device=auto" in tags["attempt.1.settings"] and "torch " in tags["attempt.1.versions"]
    assert tags["identity"] == folder.name
    assert history["train/loss"] == 200 and history["val/loss"] == 5
    assert metrics["val/psnr"] == pytest.approx(metric(folder, "val/psnr")[200])
    assert {"train/grad_norm", "train/lr", "perf/steps_per_second", "system/memory_gib"} <= set(metrics)
    assert len([path for path in images if path.endswith(".png")]) == 20


def test_same_command_reports_that_the_run_is_finished(working_folder: Path, folder: Path):
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lock", "log.txt")
    }
    repeated = run_program(cwd=working_folder)
    assert repeated.returncode == 0
    assert "is finished" in repeated.stdout and "fresh=true" in repeated.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_finished_run_can_be_evaluated_and_sampled(working_folder: Path, folder: Path):
    evaluated = run_program("stage=evaluate", f"run={folder.name}", cwd=working_folder)
    assert evaluated.returncode == 0, evaluated.stderr
    psnr = float(re.search(r"val/psnr ([\d.]+) at step", evaluated.stdout)[1])
    assert psnr == pytest.approx(max(metric(folder, "val/psnr").values()), abs=0.5)
    step = int(re.search(r"at step (\d+)", evaluated.stdout)[1])
    assert (folder / "report.html").stat().st_size > 100_000
    script = f"""
import json, mlflow
client = mlflow.MlflowClient("sqlite:///{working_folder}/runs/mlflow.db")
(run,) = client.search_runs([client.get_experiment_by_name("trainer").experiment_id])
points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "evaluate/psnr")]
print(json.dumps([points, sorted(f.path for f in client.list_artifacts(run.info.run_id, "evaluation"))]))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    points, artifacts = json.loads(output.splitlines()[-1])
    assert dict(points) == {
        0: pytest.approx(metric(folder, "val/psnr")[0], abs=0.5),
        step: pytest.approx(psnr, abs=0.01),
    }
    assert artifacts == ["evaluation/evaluation.json", "evaluation/report.html"]
    control = next(folder.glob("pictures/step-00000000/1.png"))
    request = ["sample.prompts=[make it night]", f"sample.images=[{control}]"]
    sampled = run_program("stage=sample", f"run={folder.name}", *request, cwd=working_folder)
    assert sampled.returncode == 0, sampled.stderr
    assert len(list(folder.glob("samples/*/*.png"))) == 1


def test_check_describes_the_run_and_creates_no_run_folder(tmp_path: Path):
    checked = run_program("stage=check", "method.rank=4", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert re.search(r"identity +[0-9a-f]{12}", checked.stdout)
    assert re.search(r"20,480 of them trainable", checked.stdout)
    assert not list(tmp_path.glob("runs/*/run.json"))
