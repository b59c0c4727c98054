"""Tests of MLflow stores that are others than before, are gone, or refuse writes."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

import pytest
from mlflow_helpers import TIMEOUT, images_in_mlflow, log_image, log_steps, open_tracker, steps_in_mlflow

from trainer.tracking import mlflow_tracker
from trainer.tracking.journal import Journal
from trainer.tracking.mlflow import MLflow
from trainer.tracking.mlflow_store import connect, resolve_uri
from trainer.tracking.mlflow_tracker import MLflowTracker

HERE = MLflow("run")
"""The settings of `open_tracker` for a folder named "run"."""


@pytest.fixture(scope="module")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a database without runs. MLflow takes seconds to create one."""
    folder = tmp_path_factory.mktemp("new")
    connect(resolve_uri(None, folder), "run")
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder / "mlflow.db"


@pytest.fixture
def folder(tmp_path: Path, new_database: Path) -> Path:
    """Returns a run folder beside a database without runs."""
    (tmp_path / "run").mkdir()
    shutil.copy(new_database, tmp_path)
    return tmp_path / "run"


def wait_for_error(tracker: MLflowTracker) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not tracker.errors:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_finished_run_is_incomplete_in_another_store_or_experiment_and_in_a_new_database(
    folder: Path, new_database: Path
):
    out = folder.parent
    with Journal(folder) as journal, open_tracker(folder, journal):
        log_steps(journal, 1)
    assert HERE.is_complete(folder, out) and HERE.links(folder, out)
    for other in (MLflow("run", f"sqlite:///{out}/other.db"), MLflow("other")):
        assert not other.is_complete(folder, out) and other.links(folder, out) == {}
    for path in out.glob("mlflow.db*"):
        path.unlink()
    assert not HERE.is_complete(folder, out), "the database is gone"
    shutil.copy(new_database, out)
    assert not HERE.is_complete(folder, out), "another database is in its place"


@pytest.mark.slow
def test_a_database_that_is_deleted_during_a_run_is_created_and_filled_again(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    with Journal(folder) as journal, open_tracker(folder, journal) as tracker:
        log_steps(journal, 1, 2)
        assert tracker.flush(TIMEOUT)
        # Its other files stay, as after the death of a process. Their rows must not get into the new database.
        (folder.parent / "mlflow.db").unlink()
        log_steps(journal, 3)
        wait_for_error(tracker)
        assert tracker.flush(TIMEOUT)
    assert f"{folder.parent}/mlflow.db has been deleted" in caplog.text
    assert HERE.is_complete(folder, folder.parent) and steps_in_mlflow(tracker)["train/loss"] == [1, 2, 3]


def test_a_store_that_answers_but_refuses_writes_does_not_keep_a_run_from_ending(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(mlflow_tracker, "PATIENCE", 2.0)
    with contextlib.closing(sqlite3.connect(folder.parent / "mlflow.db")) as database, database:
        refusal = "BEGIN SELECT raise(ABORT, 'disk is full'); END"
        for table in ("metrics", "runs"):
            database.execute(f"CREATE TRIGGER full_{table} BEFORE INSERT ON {table} {refusal}")
    with Journal(folder) as journal, open_tracker(folder, journal) as tracker:
        log_steps(journal, 1)
        wait_for_error(tracker)
    assert "disk is full" in caplog.text and "does not have the end of this run" in caplog.text
    assert not HERE.is_complete(folder, folder.parent)


def test_images_are_sent_when_the_disk_for_temporary_files_has_space_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mlflow_tracker, "PATIENCE", 1.0)
    # As on a full disk, no file can be created in this folder.
    monkeypatch.setattr(tempfile, "tempdir", "/proc/self")
    with Journal(folder) as journal, open_tracker(folder, journal) as first:
        log_image(folder, journal, 1)
        wait_for_error(first)
    assert images_in_mlflow(first) == [] and not HERE.is_complete(folder, folder.parent)
    monkeypatch.setattr(mlflow_tracker, "PATIENCE", TIMEOUT)
    monkeypatch.setattr(tempfile, "tempdir", None)
    with Journal(folder) as journal, open_tracker(folder, journal) as second:
        pass
    assert len(images_in_mlflow(second)) == 2 and HERE.is_complete(folder, folder.parent)
