"""Tests of the tracking settings and of the MLflow tracker with a SQLite database."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow_helpers import (
    TIMEOUT,
    client_of,
    images_in_mlflow,
    log_image,
    log_steps,
    open_tracker,
    status_in_mlflow,
    steps_in_mlflow,
    view_state,
)

from trainer.core import errors, files
from trainer.core.lock import Lock
from trainer.tracking import mlflow_internals
from trainer.tracking.journal import Journal
from trainer.tracking.mlflow import MLflow
from trainer.tracking.mlflow_store import connect, resolve_uri
from trainer.tracking.mlflow_tracker import status_of
from trainer.tracking.none import NoTracking
from trainer.training.tracked_run import shorten_overrides

ROOT = Path(__file__).resolve().parents[1]


# Settings


def test_no_tracking_imports_no_mlflow_and_writes_no_files(tmp_path: Path):
    program = (
        "import sys, pathlib\n"
        "from trainer.tracking.none import NoTracking; from trainer.tracking.journal import Journal\n"
        "folder = pathlib.Path(sys.argv[1]); journal = Journal(folder)\n"
        "with NoTracking().open(journal, folder, name='', params={}, tags={}) as tracker:\n"
        "    journal.log_metrics(1, {'train/loss': 1.0})\n"
        "    assert tracker.flush() and tracker.run_id is None and tracker.errors == 0\n"
        "    assert tracker.log_children([], description='')\n"
        "assert not {'mlflow', 'trainer.tracking.mlflow_tracker', 'matplotlib', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True)
    assert os.listdir(tmp_path) == ["journal.jsonl"]


def test_no_tracking_has_no_page_and_is_always_complete(tmp_path: Path):
    assert NoTracking().page(tmp_path) is None and NoTracking().is_complete(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///a.db",
        "sqlite:////tmp/a.db?timeout=3",
        "http://host:5000",
        "postgresql+psycopg2://me@host/db",
        "postgresql://me@host/db?sslmode=require&options=-csearch_path%3Dmine",
        "mssql+pyodbc://me@host/db?driver=ODBC+Driver+18+for+SQL+Server&Encrypt=yes",
        "databricks",
        None,
    ],
)
def test_databases_and_servers_are_accepted(uri: str | None):
    assert MLflow(uri=uri).uri == uri


@pytest.mark.parametrize(
    "uri", ["mlruns", "./mlruns", "file:///tmp/mlruns", "sqlite://", "sqlite:///:memory:", "http://", "http://[x", ""]
)
def test_unsupported_uris_are_refused_with_what_to_type(uri: str):
    with pytest.raises(
        errors.UsageError, match=r"type tracking\.uri=sqlite:///path/to/mlflow\.db or tracking\.uri=http"
    ):
        MLflow(uri=uri)


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:geheim@host",
        "https://geheim@host",
        "postgresql://me:geheim@host/db",
        "postgresql://me%3Ageheim@host/db",
        "mysql://h/d?password=geheim",
        "mysql+pymysql://u@h/d?passwd=geheim",
        "mysql+pymysql://u@h/d?charset=utf8&pass%77d=geheim",
        "mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3Dgeheim",
        "mssql+pyodbc://u@h/d?driver=ODBC+Driver+18;PWD%3Dgeheim",
        "http://h:1/?api_key=geheim",
        "http://h:1/?geheim",
        "http://h:1/#geheim",
        "sqlite:///a.db?key=geheim",
    ],
)
def test_uri_with_a_password_is_refused_without_repeating_it(uri: str):
    with pytest.raises(errors.UsageError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        MLflow(uri=uri)
    assert "geheim" not in str(refusal.value)


def test_an_unsupported_address_that_may_hold_a_password_is_not_repeated():
    with pytest.raises(errors.UsageError, match="not an MLflow database") as refusal:
        MLflow(uri="me:geheim@host:5000")
    assert "geheim" not in str(refusal.value)


def test_variables_without_effect_are_named_with_the_setting_to_type(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:geheim@host/db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    with Journal(folder) as journal:
        open_tracker(folder, journal)
    text = "MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME have no effect: type tracking.uri=ADDRESS and tracking."
    assert text in caplog.text and "geheim" not in caplog.text


def test_relative_database_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///some/my.db?timeout=3", Path("runs")) == f"sqlite:///{tmp_path}/some/my.db?timeout=3"
    assert resolve_uri(None, Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_uri("http://host:5000", Path("runs")) == "http://host:5000"


def test_page_is_the_server_or_the_command_with_all_options_that_are_not_defaults(monkeypatch: pytest.MonkeyPatch):
    assert MLflow(uri="http://host:5000").page(Path("runs")) == "http://host:5000"
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setattr(sys, "executable", str(Path(sys.executable).parent / "python"))
    assert MLflow().page(Path("runs")) == "python -m trainer ui"
    command = MLflow(experiment="two words", uri="sqlite:///a.db").page(Path("/other"))
    assert command == "python -m trainer ui --out /other --uri sqlite:///a.db --experiment 'two words'"


def test_page_command_names_the_interpreter_if_it_is_not_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    assert MLflow().page(Path("runs")) == f"{tmp_path}/bin/python -m trainer ui"
    monkeypatch.chdir(tmp_path)
    assert MLflow().page(Path("runs")) == "bin/python -m trainer ui"


# The tracker


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder for runs, named with special characters of URIs. All tests share its database."""
    return tmp_path_factory.mktemp("out") / "my runs #1 50%?"


@pytest.fixture
def folder(out: Path, request: pytest.FixtureRequest) -> Path:
    path = out / request.node.name
    path.mkdir(parents=True)
    return path


def test_mlflow_shows_the_whole_run_and_its_final_status(folder: Path):
    params = {"optimizer.betas[0]": "0.9", "dataset.path": "x" * 7000, "name": "", "a//b": "1"}
    tags = {"trainer.folder_id": "an id with 'quotes'", "attempt.1.device": "cpu"}
    options = {"params": params, "tags": tags, "description": "**hello**", "parent": "0" * 32}
    with Journal(folder) as journal:
        with open_tracker(folder, journal, **options) as tracker:
            log_steps(journal, *range(1, 1201))
            log_image(folder, journal, 600)
            log_image(folder, journal, 1200)
            assert tracker.flush(TIMEOUT) and status_in_mlflow(tracker) == "RUNNING"
            log_steps(journal, 1201)
        journal.log_event("finished")
    assert (
        tracker.errors == 0
        and status_in_mlflow(tracker) == "FINISHED"
        and MLflow(experiment=folder.name).is_complete(folder, folder.parent)
    )
    steps = list(range(1, 1202))
    assert steps_in_mlflow(tracker) == {"train/loss": steps, "perf/steps_per_second": steps}
    name = "samples/make it night_ _now_"
    assert images_in_mlflow(tracker) == [
        f"{name} {step} {suffix}" for step in (1200, 600) for suffix in ("png", "webp")
    ]
    run = client_of(tracker).get_run(tracker.run_id)
    assert run.info.run_name == "a run" and run.info.artifact_uri.startswith(str(folder.parent / "mlartifacts"))
    params = run.data.params
    assert params["optimizer.betas_0_"] == "0.9" and params["name"] == "" and params["a/b"] == "1"
    assert params["dataset.path"].endswith("x... (7000 characters)")
    expected = {
        "attempt.1.device": "cpu",
        "mlflow.note.content": "**hello**",
        "mlflow.parentRunId": "0" * 32,
        "mlflow.loggedImages": "True",
        "trainer.host": socket.gethostname(),
    }
    assert expected.items() <= run.data.tags.items()
    with contextlib.closing(sqlite3.connect(folder.parent / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_next_attempt_sends_only_missing_records(folder: Path, caplog: pytest.LogCaptureFixture):
    with Journal(folder) as journal:
        with pytest.raises(errors.Interrupted), open_tracker(folder, journal) as first:
            log_steps(journal, *range(1, 31))
            log_image(folder, journal, 30)
            assert first.flush(TIMEOUT)
            raise errors.Interrupted(signal.SIGTERM)
        assert status_in_mlflow(first) == "KILLED"
        # As after a kill: in the journal, but never sent.
        log_steps(journal, *range(31, 41))
        log_image(folder, journal, 40)
    assert not MLflow(experiment=folder.name).is_complete(folder, folder.parent)
    (folder / "tracking.json").unlink()  # as if the first attempt had been killed before it wrote the note
    with Journal(folder) as journal:
        params = {"optimizer.lr": "0.002"}
        with pytest.raises(ZeroDivisionError), open_tracker(folder, journal, params=params) as second:
            assert second.flush(TIMEOUT) and status_in_mlflow(second) == "RUNNING"
            log_steps(journal, *range(25, 51))
            log_image(folder, journal, 40)
            log_image(folder, journal, 50)
            second.flush(TIMEOUT)
            raise ZeroDivisionError
        assert second.run_id == first.run_id and status_in_mlflow(second) == "FAILED"
        assert steps_in_mlflow(second)["train/loss"] == list(range(1, 51))
        expected = [[step, suffix] for step in ("30", "40", "50") for suffix in ("png", "webp")]
        assert [name.split()[-2:] for name in images_in_mlflow(second)] == expected
        assert "MLflow keeps the first values of optimizer.lr" in caplog.text


def test_run_deleted_in_the_ui_is_created_again(folder: Path):
    with Journal(folder) as journal:
        with open_tracker(folder, journal) as first:
            log_steps(journal, *range(1, 51))
            log_image(folder, journal, 50)
        client_of(first).delete_run(first.run_id)
        with open_tracker(folder, journal) as second:
            pass
    assert second.run_id != first.run_id
    assert steps_in_mlflow(second)["train/loss"] == list(range(1, 51)) and len(images_in_mlflow(second)) == 2


def test_partly_uploaded_image_is_sent_again_and_damaged_images_are_skipped(folder: Path):
    with Journal(folder) as journal, open_tracker(folder, journal) as tracker:
        log_image(folder, journal, 1)
        tracker.flush(TIMEOUT)
    assert tracker.run_id is not None
    images = folder.parent / "mlartifacts" / tracker.run_id / "artifacts" / "images"
    for thumbnail in images.glob("*.webp"):
        thumbnail.unlink()
    (folder / "pictures/2.png").write_bytes(b"not an image")
    with Journal(folder) as journal, open_tracker(folder, journal) as tracker:
        journal.log_image(2, "samples/0", "pictures/2.png")
        journal.log_image(2, "samples/1", "pictures/missing.png")
        log_image(folder, journal, 3)
        assert tracker.flush(TIMEOUT)
    expected = [[step, suffix] for step in "13" for suffix in ("png", "webp")]
    assert [name.split()[-2:] for name in images_in_mlflow(tracker)] == expected


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(70), "FAILED"),
        (SystemExit(143), "KILLED"),
        (errors.NonFiniteError("NaN"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (errors.Interrupted(2), "KILLED"),
    ],
)
def test_status_depends_on_how_the_run_ends(error: BaseException | None, status: str):
    assert status_of(error) == status


def test_next_run_ends_dead_runs_and_no_others(folder: Path):
    client, experiment = connect(resolve_uri(None, folder.parent), folder.name)

    def start_run(name: str, host: str = socket.gethostname()) -> str:
        (folder / name).mkdir()
        (folder / name / "lock").touch()
        tags = {"trainer.folder": str(folder / name), "trainer.host": host}
        return client.create_run(experiment, tags=tags).info.run_id

    runs = {name: start_run(name) for name in ("dead", "alive", "without folder", "finished without MLflow")}
    runs["on another host"] = start_run("on another host", "elsewhere")
    (folder / "without folder" / "lock").unlink()
    note = {"run_id": runs["finished without MLflow"], "status": "FINISHED"}
    files.write_json(folder / "finished without MLflow" / "tracking.json", note)
    with Lock(folder / "alive" / "lock"), Journal(folder) as journal, open_tracker(folder, journal) as tracker:
        tracker.flush(TIMEOUT)
    assert {name: client.get_run(run).info.status for name, run in runs.items()} == {
        "dead": "KILLED",
        "alive": "RUNNING",
        "without folder": "RUNNING",
        "finished without MLflow": "FINISHED",
        "on another host": "RUNNING",
    }


def test_locked_database_delays_no_step_and_loses_no_record(folder: Path):
    with Journal(folder) as journal, open_tracker(folder, journal) as tracker:
        log_steps(journal, 1)
        assert tracker.flush(TIMEOUT)
        with contextlib.closing(sqlite3.connect(folder.parent / "mlflow.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            begin = time.perf_counter()
            log_steps(journal, *range(2, 102))
            assert time.perf_counter() - begin < 0.5
            assert not tracker.flush(1)
            other.execute("ROLLBACK")
        assert tracker.flush(TIMEOUT)
    assert steps_in_mlflow(tracker)["train/loss"] == list(range(1, 102))


def test_database_moved_with_its_runs_keeps_its_images(folder: Path, tmp_path: Path):
    from mlflow.tracking._tracking_service import utils as artifact_repositories

    connect(resolve_uri(None, folder.parent), folder.name)
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    # The shared database stays; a copy of it moves.
    with (
        contextlib.closing(sqlite3.connect(folder.parent / "mlflow.db")) as shared,
        contextlib.closing(sqlite3.connect(before / "mlflow.db")) as copy,
    ):
        shared.backup(copy)
    (before / "run").mkdir()
    with Journal(before / "run") as journal, open_tracker(before / "run", journal) as first:
        log_image(before / "run", journal, 1)
    before.rename(after)
    artifact_repositories._artifact_repos_cache.clear()  # type: ignore[attr-defined]  # as in a new process
    with Journal(after / "run") as journal, open_tracker(after / "run", journal) as second:
        log_image(after / "run", journal, 2)
    assert second.run_id == first.run_id and len(images_in_mlflow(second)) == 4 and not before.exists()


# Pages


def test_a_tracker_that_has_not_reached_mlflow_has_no_links(folder: Path):
    with Journal(folder) as journal:
        open_tracker(folder, journal)
        assert MLflow().sweep_links(folder, []) == {}


def test_comparison_url_has_the_runs_first_as_mlflow_requires():
    url = mlflow_internals.comparison_url("http://host:5000/", "3", ["a", "b"])
    runs, experiments = "%5B%22a%22%2C%20%22b%22%5D", "%5B%223%22%5D"
    query = f"runs={runs}&experiments={experiments}&workflowType=machine_learning"
    assert url == f"http://host:5000/#/compare-runs?{query}"


def test_experiment_without_the_view_of_its_runs_gets_it(tmp_path: Path):
    uri = resolve_uri(None, tmp_path)
    client, experiment = connect(uri, "trainer")
    key = mlflow_internals.RUNS_VIEW_TAG
    view = client.get_experiment(experiment).tags[key]
    client.set_experiment_tag(experiment, key, "{}")
    connect(uri, "trainer")
    assert client.get_experiment(experiment).tags[key] == view == mlflow_internals.runs_view()
    assert view_state(view)["selectedColumns"][:2] == ["metrics.`val/loss`", "metrics.`val/psnr`"]


def test_view_of_children_has_columns_and_images_of_the_sweep():
    state = view_state(mlflow_internals.children_view("an id", ["optimizer.lr"], ["samples/1_night"], 40, 4))
    assert state["searchFilter"] == "tags.mlflow.parentRunId = 'an id'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val/loss`", True)
    assert "params.`optimizer.lr`" in state["selectedColumns"]
    assert "params.`method.rank`" not in state["selectedColumns"]
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert all(chart["metricSectionId"] in sections for chart in state["compareRunCharts"])
    (image,) = (chart for chart in state["compareRunCharts"] if chart["type"] == "IMAGE")
    assert (image["imageKeys"], image["step"], image["showRunParams"]) == (["samples/1_night"], 40, False)


# Names of runs


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ([], ""),
        (["optimizer.lr=1e-4", "method.rank=4", "dataset=pairs"], "lr=1e-4 rank=4 dataset=pairs"),
        (["model.path=a/b.c", "dataset.path=d", "seed=1"], "model.path=a/b.c dataset.path=d seed=1"),
        (["dataset.edits=[night,outline]", "~ema"], "edits=[night,outline] ~ema"),
    ],
)
def test_run_names_are_short_and_unambiguous(settings: list[str], name: str):
    assert shorten_overrides(settings) == name
