"""Tests of the page of a run in MLflow: its description, its charts and its links; and of what must arrive later."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow_helpers import (
    TIMEOUT,
    client_of,
    images_in_mlflow,
    log_image,
    log_steps,
    open_tracker,
    status_in_mlflow,
    view_state,
)

from trainer.core import documents, files
from trainer.tracking import RESULT, mlflow_internals, mlflow_tracker
from trainer.tracking.journal import IMAGE, Journal
from trainer.tracking.mlflow import MLflow
from trainer.tracking.mlflow_tracker import MLflowTracker
from trainer.tracking.none import NoTracking

ABOUT = f"{RESULT}\n\n**lora** on some model"
BEGIN, END = RESULT.split("\n")
IMAGE_KEY = "samples/make it night_ _now_"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder for runs. All tests share its database."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture
def folder(out: Path, request: pytest.FixtureRequest) -> Path:
    path = out / request.node.name
    path.mkdir()
    return path


def evaluate(folder: Path, journal: Journal, step: int, loss: float, psnr: float) -> None:
    journal.log_metrics(step, {"val/loss": loss, "val/psnr": psnr})
    log_image(folder, journal, step)


def description(tracker: MLflowTracker) -> str:
    return client_of(tracker).get_run(tracker.run_id).data.tags["mlflow.note.content"]


def charts(tracker: MLflowTracker) -> dict[str, Any]:
    """Returns the state of the page with the curves and images of the run."""
    tags = client_of(tracker).get_experiment(tracker.experiment_id).tags
    return view_state(tags[mlflow_internals.view_tag(tracker.run_id)])


def test_description_follows_losses_and_images_and_keeps_what_the_user_writes(folder: Path):
    with Journal(folder) as journal, open_tracker(folder, journal, description=ABOUT) as tracker:
        evaluate(folder, journal, 0, 4.78, 6.71)
        assert tracker.flush(TIMEOUT)
        text = description(tracker)
        assert "val/loss **4.78** before training (best) | val/psnr **6.7 dB** before training (best)" in text
        edited = text.replace("**lora**", "My **best** lora")
        client_of(tracker).set_tag(tracker.run_id, "mlflow.note.content", f"Look at this!\n\n{edited}")
        evaluate(folder, journal, 20, 0.5, 28.04)
        evaluate(folder, journal, 40, float("nan"), 31.0)
        evaluate(folder, journal, 60, 0.61239, 30.0)
    text = description(tracker)
    assert text.startswith(f"Look at this!\n\n{BEGIN}\n\n") and text.endswith(
        f"{END}\n\nMy **best** lora on some model"
    )
    assert "val/loss 4.78 before training, **0.6124** at step 60, best 0.5 at step 20" in text
    assert "val/psnr 6.7 before training, **30.0 dB** at step 60, best 31.0 at step 40" in text
    link = (
        f"(#/experiments/{tracker.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={tracker.run_id}"
    )
    assert f"**[Images and curves]{link}&compareRunsMode=CHART)**" in text
    (image,) = [path for path in images_of(tracker) if path.endswith(".webp") and "+step+60+" in path]
    assert text.count("![") == 1 and mlflow_internals.image_markdown(tracker.run_id, image, IMAGE_KEY) in text


def images_of(tracker: MLflowTracker) -> list[str]:
    return [file.path for file in client_of(tracker).list_artifacts(tracker.run_id, "images")]


def test_charts_of_a_run_show_losses_then_the_last_images_and_speed_last(folder: Path):
    with Journal(folder) as journal, open_tracker(folder, journal, description=ABOUT) as tracker:
        evaluate(folder, journal, 0, 4.78, 6.7)
        evaluate(folder, journal, 20, 0.5, 28.0)
    state = charts(tracker)
    assert state["searchFilter"] == f"attributes.run_id = '{tracker.run_id}'" and state["runListHidden"]
    names = [section["name"] for section in state["compareRunSections"]]
    assert names == ["val", "samples", "train", "val/loss by time", "perf"]
    first, second, image = state["compareRunCharts"][:3]
    assert (first["metricKey"], second["metricKey"]) == ("val/loss", "val/psnr")
    assert (image["imageKeys"], image["step"], image["showRunParams"]) == ([IMAGE_KEY], 20, False)
    found = client_of(tracker).search_runs([tracker.experiment_id], state["searchFilter"])
    assert [run.info.run_id for run in found] == [tracker.run_id]


def test_description_without_the_lines_of_the_result_stays_as_it_is(folder: Path):
    with Journal(folder) as journal, open_tracker(folder, journal, description=ABOUT) as tracker:
        log_steps(journal, 1)
        assert tracker.flush(TIMEOUT)
        client_of(tracker).set_tag(tracker.run_id, "mlflow.note.content", "mine")
        evaluate(folder, journal, 0, 4.78, 6.7)
    assert description(tracker) == "mine" and charts(tracker)["compareRunCharts"]


def test_many_images_fit_into_the_description(folder: Path):
    words = "x" * 200
    with Journal(folder) as journal, open_tracker(folder, journal, description=ABOUT) as tracker:
        log_image(folder, journal, 0)
        for number in range(12):
            journal.log_image(0, f"samples/{number}_{words}"[:100], "pictures/0.png")
        about = f"{ABOUT} {'y' * 6000}"
        assert tracker.flush(TIMEOUT) and description(tracker).count("![") == 8
        client_of(tracker).set_tag(tracker.run_id, "mlflow.note.content", about)
        journal.log_metrics(0, {"val/loss": 1.0})
    assert 0 < description(tracker).count("![") < 8 and len(description(tracker)) <= 8000
    assert len([chart for chart in charts(tracker)["compareRunCharts"] if chart["type"] == "IMAGE"]) == 13


def test_links_lead_to_the_server_or_to_the_address_of_the_ui_once_mlflow_has_the_run(folder: Path):
    with Journal(folder) as journal, open_tracker(folder, journal, description=ABOUT) as tracker:
        log_steps(journal, 1)
        assert tracker.flush(TIMEOUT) and MLflow(experiment=folder.name).links(folder, folder.parent) == {}
    query = f"workflowType=machine_learning&viewStateShareKey={tracker.run_id}&compareRunsMode=CHART"
    page = f"#/experiments/{tracker.experiment_id}/runs?"
    expected = {
        "images and curves": f"{page}{query}",
        "all runs": f"{page}workflowType=machine_learning&viewStateShareKey=trainer",
    }
    local = {title: f"http://127.0.0.1:5000/{rest}" for title, rest in expected.items()}
    settings, out = MLflow(folder.name), folder.parent
    assert settings.links(folder, out) == local and NoTracking().links(folder, out) == {}
    note = documents.read_json(folder / "tracking.json")
    files.write_json(folder / "tracking.json", note | {"uri": "https://host/mlflow/"})
    remote = {title: f"https://host/mlflow/{rest}" for title, rest in expected.items()}
    assert settings.links(folder, out) == {}
    assert MLflow(folder.name, "https://host/mlflow/").links(folder, out) == remote


# What must arrive later


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has the device of a full disk")
def test_image_arrives_when_there_is_space_for_temporary_files_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mlflow_tracker, "PERIOD", 0.1)
    monkeypatch.setattr(mlflow_tracker, "PATIENCE", 3.0)
    make_folder = tempfile.mkdtemp
    with Journal(folder) as journal:
        log_image(folder, journal, 1)
        (record,) = (record for record in journal.records() if record["kind"] == IMAGE)
        name = mlflow_internals.image_name(record["key"], record["step"], record["time"])

        def full_folder(*arguments: Any) -> str:
            path = make_folder(*arguments)
            os.symlink("/dev/full", f"{path}/{name}.png")
            return path

        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "mkdtemp", full_folder)
            begin = time.monotonic()
            with open_tracker(folder, journal, description=ABOUT) as first:
                log_steps(journal, 1)
            assert time.monotonic() - begin < 60  # the end of a run does not wait for the space
        assert (
            first.errors
            and images_of(first) == []
            and not MLflow(experiment=folder.name).is_complete(folder, folder.parent)
        )
        with open_tracker(folder, journal, description=ABOUT) as second:
            pass
    assert second.run_id == first.run_id and MLflow(experiment=folder.name).is_complete(folder, folder.parent)
    assert images_in_mlflow(second) == [f"{IMAGE_KEY} 1 {suffix}" for suffix in ("png", "webp")]
    assert "![" in description(second)


def test_store_that_answers_and_refuses_the_end_of_a_run_gets_it_later(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mlflow_tracker, "PATIENCE", 2.0)
    database = folder.parent / "mlflow.db"
    with Journal(folder) as journal:
        with open_tracker(folder, journal, description=ABOUT) as first:
            log_steps(journal, 1)
            assert first.flush(TIMEOUT)
            with contextlib.closing(sqlite3.connect(database)) as store:
                condition = f"WHEN NEW.run_uuid = '{first.run_id}'"
                refusal = "BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
                store.execute(f"CREATE TRIGGER refuse BEFORE UPDATE ON runs {condition} {refusal}")
            begin = time.monotonic()
        assert time.monotonic() - begin < 60
        assert status_in_mlflow(first) == "RUNNING" and not MLflow(experiment=folder.name).is_complete(
            folder, folder.parent
        )
        with contextlib.closing(sqlite3.connect(database)) as store:
            store.execute("DROP TRIGGER refuse")
        with open_tracker(folder, journal, description=ABOUT):
            pass
    assert status_in_mlflow(first) == "FINISHED" and MLflow(experiment=folder.name).is_complete(folder, folder.parent)
