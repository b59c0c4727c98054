"""The MLflow store, a database or server: create and open it safely from several processes at once."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 (see _import_lock)
import contextlib
import fcntl
import logging
import os
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import unquote

from trainer.core import errors, files
from trainer.tracking import journal, mlflow_internals
from trainer.tracking.mlflow_note import read_note

if TYPE_CHECKING:
    from mlflow import MlflowClient

HOST = "127.0.0.1"
"""Host on which `python -m trainer ui` serves a database."""
PORT = 5000
"""Port of `python -m trainer ui`, unless it is taken."""

ANSWER_TIME = 20.0
"""Seconds to wait for a store that is asked for a run."""
_silent: set[str] = set()
"""URIs of the stores that did not answer this process when they were asked for a run. They are not asked again."""

log = logging.getLogger(__name__)

# The lock keeps other threads from forking (the workers of a data loader) during the import: the child would inherit
# module locks that nobody releases. concurrent.futures is imported above for the same reason. It registers fork hooks
# that hold a lock of its own; if MLflow were the first to import it while another thread waits here to fork, that fork
# would release the lock without having acquired it.
_import_lock = threading.RLock()
os.register_at_fork(
    before=_import_lock.acquire, after_in_parent=_import_lock.release, after_in_child=_import_lock.release
)


def import_mlflow() -> ModuleType:
    """Imports MLflow, configured to be silent and not to retry requests. Takes about two seconds the first time."""
    with _import_lock:
        for name, value in mlflow_internals.CLIENT_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow

        return mlflow


def resolve_uri(uri: str | None, out: Path) -> str:
    """Returns `uri` with an absolute path; None stands for the database in `out`, the parent folder of all runs."""
    if uri is None:
        return _sqlite_uri(out.resolve() / "mlflow.db")
    path = _sqlite_path(uri)
    if path is None:
        return uri
    _, mark, query = uri.partition("?")
    return _sqlite_uri(path.absolute()) + mark + query


def page_address(uri: str) -> str:
    """Returns where the pages of a store are served: the server itself, or `python -m trainer ui` for a database."""
    return uri if uri.startswith("http") else f"http://{HOST}:{PORT}"


def connect(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Returns a client of the store at `uri` (see `resolve_uri`) and the ID of the experiment.

    Creates the database and the experiment if they do not exist.
    """
    mlflow = import_mlflow()
    path = _sqlite_path(uri)
    if path is None:
        client = mlflow.MlflowClient(uri, uri)
        return client, _open_experiment(client, experiment, None)
    # Processes that create the tables at the same time damage the database permanently.
    with _locked(path.with_suffix(".lock")):
        artifacts = path.parent / "mlartifacts"
        if not path.exists():
            mlflow_internals.close_database(uri)
            _create_database(path, artifacts)
        client = mlflow.MlflowClient(uri, uri)
        experiment_id = _open_experiment(client, experiment, str(artifacts))
        _update_artifact_location(path, client.get_experiment(experiment_id).artifact_location, artifacts)
        return client, experiment_id


def missing_store(uri: str, experiment: str) -> str | None:
    """Returns why there is nothing to show: no database at `uri`, or no experiment of this name; None if there is.

    Creates nothing.
    """
    path = _sqlite_path(uri)
    if path is not None and not path.is_file():
        return f"there are no runs in MLflow yet (no file {path})"
    client = import_mlflow().MlflowClient(uri, uri)
    if client.get_experiment_by_name(experiment) is not None:
        return None
    names = [found.name for found in client.search_experiments()]
    return f"there is no experiment {experiment}, only {', '.join(sorted(names)[:8]) or 'none'}"


def database_file(uri: str) -> tuple[int, int] | None:
    """Returns what identifies the file of a SQLite database at `uri`; None for a server or another database.

    Raises errors.StorageError if the file is missing.
    """
    path = _sqlite_path(uri)
    if path is None:
        return None
    if not path.exists():
        raise errors.StorageError(f"{path} has been deleted")
    status = path.stat()
    return status.st_dev, status.st_ino


def has_run(uri: str, run_id: str) -> bool:
    """Returns whether the store at `uri` has a run; True, with a warning, if it does not answer within ANSWER_TIME."""
    if uri in _silent:
        return True
    answers: list[bool | Exception] = []

    def ask() -> None:
        try:
            answers.append(_has_run(uri, run_id))
        except Exception as error:  # errors of MLflow and SQLAlchemy have no common base class
            answers.append(error)

    # A daemon thread, because a request that hangs must not keep the process from exiting.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_TIME)
    answer = answers[0] if answers else TimeoutError(f"no answer in {ANSWER_TIME:g} s")
    if isinstance(answer, Exception):
        _silent.add(uri)
        log.warning("MLflow at %s: %s. Whether it still has this run is unknown.", uri, root_cause(answer))
        return True
    return answer


def _has_run(uri: str, run_id: str) -> bool:
    path = _sqlite_path(uri)
    if path is not None:
        return path.exists() and mlflow_internals.database_has_run(path, run_id)
    client = import_mlflow().MlflowClient(uri, uri)
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def root_cause(error: BaseException) -> str:
    """Returns one line about an exception or, if a disk or network failure caused it, about that failure."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    roots = [link for link in chain if isinstance(link, (OSError, sqlite3.Error))]
    text = " ".join(str((roots or chain[:1])[-1]).split()) or type(error).__name__
    return text[:300].rstrip(".")


def end_dead_runs(client: MlflowClient, experiment_id: str, own_run_id: str) -> None:
    """Ends the runs of this host that MLflow shows as running although no process holds the lock of their folder.

    Such a run was killed, or could not reach MLflow when it ended.
    """
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
        tags = run.data.tags
        if run.info.run_id == own_run_id or tags.get("trainer.host") != socket.gethostname():
            continue
        folder = Path(tags.get("trainer.folder", ""))
        if folder.is_absolute() and _is_unlocked(folder / "lock"):
            note = read_note(folder)
            status = note.get("status") if note.get("run_id") == run.info.run_id else None
            client.set_terminated(run.info.run_id, status or "KILLED", _modification_time(folder / journal.FILE_NAME))


def _create_database(path: Path, artifacts: Path) -> None:
    """Creates an empty database at `path` atomically, because MLflow cannot open one that was created only in part."""
    # Only the holder of the lock creates a database, so partial files were left by a process that was killed.
    for name in os.listdir(path.parent):
        if name.startswith(files.PARTIAL_PREFIX) and path.name in name:
            (path.parent / name).unlink()
    for suffix in ("-wal", "-shm"):
        # Left by a database that has been deleted or moved away. SQLite would read its rows into the new one.
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    with files.replace_file(path) as temporary:
        mlflow_internals.create_database(temporary, _sqlite_uri(temporary), str(artifacts))


def _update_artifact_location(path: Path, recorded: str, artifacts: Path) -> None:
    """Records the new location of the artifacts if the folder of the database has been moved or renamed."""
    old = Path(recorded)
    if old != artifacts and old.is_absolute() and old.name == artifacts.name and not old.exists():
        mlflow_internals.move_artifacts(path, recorded, str(artifacts))


def _open_experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Returns the ID of the experiment, which is created, restored and given the current view of its runs as needed."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifacts, mlflow_internals.EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
            assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        # MLflow does not allow a new experiment with the name of a deleted one.
        client.restore_experiment(experiment.experiment_id)
        log.info("The MLflow experiment %s had been deleted and is restored.", name)
    key, view = mlflow_internals.RUNS_VIEW_TAG, mlflow_internals.runs_view()
    if experiment.tags.get(key) != view:
        client.set_experiment_tag(experiment.experiment_id, key, view)
    return experiment.experiment_id


def _is_unlocked(lock: Path) -> bool:
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
        return True
    except OSError:  # locked, missing or unreadable: nothing is known about the owner
        return False


def _modification_time(path: Path) -> int | None:
    """Returns milliseconds since the epoch; None if there is no such file."""
    try:
        return round(path.stat().st_mtime * 1000)
    except OSError:
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file at `path`, which other processes wait for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing alone would not do: a worker forked in the meantime shares the open file and would hold the lock
            # until it exits.
            fcntl.flock(file, fcntl.LOCK_UN)


def _sqlite_uri(path: Path) -> str:
    # SQLAlchemy ends the path at ? and decodes % in it.
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def _sqlite_path(uri: str) -> Path | None:
    """Returns the path of a SQLite database; None for another database or a server."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))
