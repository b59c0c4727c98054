"""MLflow as a sink of the journal: a thread reads what the journal has, asks MLflow what it has, and sends what it lacks.

Nothing is doubled: a point carries the journal's own time, so that to MLflow's databases a point sent twice is one row, and a picture's file
is named by its key and step. Nothing is lost: after any failure, and in the next attempt, MLflow is asked again where it stands.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401
import contextlib
import fcntl
import getpass
import json
import logging
import os
import posixpath
import re
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote

from trainer.core import errors, files
from trainer.tracking import MLflow, Sink, view
from trainer.tracking import journal as journals
from trainer.tracking.journal import Journal, read

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

PERIOD = 2.0
"""Seconds between two batches."""
LONGEST_PAUSE = 60.0
"""Seconds between two tries while MLflow does not answer; begins with twice PERIOD and doubles."""
PATIENCE = 20.0
"""Seconds without a sign of life from MLflow after which the end of a run no longer waits for it."""
PATIENCE_INTERRUPTED = 2.0
"""The same in all for a run that was told to stop: it owes its checkpoint and its exit within seconds."""

BATCH = 1000
"""Metrics in one request: MLflow's own limit."""

log = logging.getLogger(__name__)

# The client as it comes waits up to 248 s for a dead server. It is we who try again, after asking what has arrived.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

# A fork (of a loader's workers) in the middle of an import in another thread would leave the child with modules locked for ever.
# concurrent.futures is imported above for the same reason: it hooks a lock of its own on forks, and were MLflow the first to import it while
# a fork waits here, that fork would release the lock without ever having taken it.
_importing = threading.RLock()
os.register_at_fork(before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release)


class MLflowSink(Sink):
    """The run in `folder` as MLflow shows it, kept up by a thread of its own; see `trainer.tracking.open_sink`."""

    def __init__(
        self,
        settings: MLflow,
        out: Path,
        folder: Path,
        journal: Journal,
        *,
        name: str,
        params: dict[str, str],
        tags: dict[str, str],
        description: str = "",
        parent: str | None = None,
    ):
        folder = folder.resolve()
        self.uri = address(settings.uri, out)
        self._experiment = settings.experiment
        self._folder = folder
        self._journal = journal.path.resolve()
        self._name = name
        self._params = {_clean(key): _shorten(value, 6000) for key, value in params.items()}
        own = {"trainer.folder": str(folder), "trainer.host": socket.gethostname()}
        # Without a name of its own the run is known by its place.
        own["trainer.folder_id"] = f"{own['trainer.host']}:{folder}"
        if parent:
            own["mlflow.parentRunId"] = parent
        self._tags = {_clean(key): _shorten(value, 8000) for key, value in {**own, **tags}.items()}
        self._description = _shorten(description, 8000)

        self.errors = 0
        self._failing = False
        self._sent = 0  # bytes of the journal that MLflow has
        self._sign_of_life = time.monotonic()
        self._ending: str | None = None
        self._given_up = False
        self._wake = threading.Event()
        # A daemon: a call that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._ending = status_of(error)
        self._wake.set()
        begin = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.05)
            if self._ending == "KILLED":
                waited = time.monotonic() - begin - PATIENCE_INTERRUPTED
            else:
                waited = time.monotonic() - max(begin, self._sign_of_life) - PATIENCE
            if waited > 0:
                self._give_up()
                return

    def flush(self, timeout: float = 20.0) -> bool:
        """Wait until all that the journal holds by now is in MLflow, at most `timeout` seconds; whether it is."""
        target = self._journal.stat().st_size
        deadline = time.monotonic() + timeout
        self._wake.set()
        while self._sent < target and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._sent >= target

    def _work(self) -> None:
        remote: Remote | None = None
        pause = PERIOD
        while not self._given_up:
            ending = self._ending  # read first: what was journaled before it is sent below
            try:
                if remote is None:
                    remote = self._open()
                for offset in remote.send(self._journal):
                    self._sent, self._sign_of_life = offset or self._sent, time.monotonic()
                if self._failing:
                    log.info("MLflow at %s answers again and has all.", self.uri)
                    self._failing = False
                if ending:
                    remote.client.set_terminated(remote.run_id, ending)
                    self._keep_note(status=ending, sent=self._sent)
                    return
                pause = PERIOD
            except Exception as error:  # whatever goes wrong here, training must not feel it
                # What arrived is unknown, so the next try begins by asking.
                remote, self._sent = None, 0
                self.errors += 1
                if not self._failing and not self._given_up:
                    log.warning(
                        "MLflow at %s: %s. Training goes on; what MLflow lacks is sent when it is back.",
                        self.uri,
                        _one_line(error),
                    )
                self._failing = True
                pause = min(2 * pause, LONGEST_PAUSE)
            self._wake.wait(0.5 if self._ending else pause)
            self._wake.clear()

    def _open(self) -> Remote:
        client, self.experiment_id = connect(self.uri, self._experiment)
        self._sign_of_life = time.monotonic()
        run = self._find(client) or client.create_run(self.experiment_id, self._begun(), self._tags, self._name)
        self.run_id = run.info.run_id
        self._keep_note()
        self._describe(client, run)
        with contextlib.suppress(Exception):  # tidying up after others must not keep this run from being shown
            _end_dead_runs(client, self.experiment_id, self.run_id)
        self._sign_of_life = time.monotonic()
        return Remote(client, run)

    def _begun(self) -> int | None:
        """When the run began, ms: with its first record, which may have been long before MLflow answered."""
        _, first = next(read(self._journal), (0, None))
        return round(1000 * first["time"]) if first else None

    def _find(self, client: MlflowClient) -> Run | None:
        """The run of this folder, if the experiment has it: by what the folder remembers, else by its tag."""
        from mlflow.exceptions import MlflowException

        note = _read_note(self._folder)
        if note.get("experiment_id") == self.experiment_id and note.get("uri") == self.uri:
            try:
                run = client.get_run(note.get("run_id"))
                # The id alone is no proof: another store may have come to live at this address.
                if run.info.experiment_id == self.experiment_id and run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        # A process killed between making a run and noting its id leaves one that only the tag can find.
        name = self._tags["trainer.folder_id"].replace("'", "\\'")
        found = client.search_runs(
            [self.experiment_id], f"tags.`trainer.folder_id` = '{name}'", max_results=1, order_by=["start_time ASC"]
        )
        return found[0] if found else None

    def _describe(self, client: MlflowClient, run: Run) -> None:
        from mlflow.entities import Param, RunTag

        known = run.data.params
        changed = sorted(key for key, value in self._params.items() if known.get(key, value) != value)
        if changed:
            log.warning("MLflow keeps the first values of %s: params are written once.", ", ".join(changed))
        params = [Param(key, value) for key, value in self._params.items() if key not in known]
        tags = {**_source(), **self._tags}
        # Name and description belong to the user once they are there: the UI lets them be edited.
        if self._description and "mlflow.note.content" not in run.data.tags:
            tags["mlflow.note.content"] = self._description
        client.log_batch(
            run.info.run_id, params=params, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True
        )
        client.update_run(run.info.run_id, status="RUNNING")

    def _keep_note(self, **more: Any) -> None:
        with contextlib.suppress(errors.StorageError):
            files.write_json(
                self._folder / NOTE,
                {"uri": self.uri, "experiment_id": self.experiment_id, "run_id": self.run_id, **more},
            )

    def _give_up(self) -> None:
        self._given_up = True
        log.warning(
            "MLflow at %s does not answer: it lacks the end of this run. %s has all; the same command sends it.",
            self.uri,
            self._journal,
        )
        # So that whoever finds the run still RUNNING in MLflow knows how it ended.
        with contextlib.suppress(errors.StorageError):
            files.write_json(self._folder / NOTE, {**_read_note(self._folder), "status": self._ending, "sent": None})


class Remote:
    """The run as MLflow has it. Any exception leaves it useless: what MLflow has is then unknown, and another one has to ask."""

    def __init__(self, client: MlflowClient, run: Run):
        self.client = client
        self.run_id: str = run.info.run_id
        self._offset = 0
        # The latest step of each metric tells what has arrived, since each metric is sent in the order of its steps, batches whole.
        self._last: dict[str, int] = {metric.key: metric.step for metric in run.data._metric_objs}
        self._pictures: list[dict[str, Any]] = []
        self._known_pictures: set[str] | None = None

    def send(self, path: Path) -> Iterator[int]:
        """Send what the journal at `path` has and MLflow lacks. Yields after each answer of MLflow; not 0: all before that byte is there."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        for offset, record in journals.read(path, self._offset):
            self._offset = offset
            if record["kind"] == journals.METRICS:
                step, milliseconds = record["step"], round(record["time"] * 1000)
                for key, value in record["values"].items():
                    key = _clean(key)
                    if step > self._last.get(key, -1):
                        self._last[key] = step
                        metrics.append(Metric(key, value, milliseconds, step))
                if len(metrics) >= BATCH:
                    self._log(metrics[:BATCH])
                    del metrics[:BATCH]
                    yield 0
            elif record["kind"] == journals.PICTURE:
                self._pictures.append(record)
        if metrics:
            self._log(metrics)
            yield 0
        # Pictures come last, one request each: where they are refused, the metrics are there all the same.
        for record in self._pictures:
            self._log_picture(path.parent, record)
            yield 0
        self._pictures.clear()
        yield self._offset

    def _log(self, metrics: list[Metric]) -> None:
        self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)

    def _log_picture(self, folder: Path, record: dict[str, Any]) -> None:
        """What `MlflowClient.log_image` writes for its step slider, but under names that a second try writes again instead of doubling."""
        mlflow = _mlflow()
        from mlflow.tracking.multimedia import compress_image_size

        if self._known_pictures is None:
            self._known_pictures = {
                posixpath.basename(file.path) for file in self.client.list_artifacts(self.run_id, "images")
            }
        step, key = record["step"], _picture_key(record)
        name = f"{key.replace('/', '~')}+step+{step}+timestamp+{round(record['time'] * 1000)}+{uuid.uuid5(uuid.NAMESPACE_OID, f'{key} {step}')}"
        if f"{name}+compressed.webp" in self._known_pictures:
            return
        with tempfile.TemporaryDirectory() as temporary:
            large, small = f"{temporary}/{name}.png", f"{temporary}/{name}+compressed.webp"
            try:
                picture = mlflow.Image(str(folder / record["path"])).to_pil()
                picture.save(large)
                compress_image_size(picture).save(small)
            except Exception as error:  # a picture that is gone or broken stays so: no reason to try for ever
                log.warning("MLflow goes without the picture %s: %s.", record["path"], _one_line(error))
                return
            if not self._known_pictures:
                self.client.set_tag(self.run_id, "mlflow.loggedImages", "True", synchronous=True)
            self.client.log_artifact(self.run_id, large, "images")
            self.client.log_artifact(
                self.run_id, small, "images"
            )  # last: it is by this one that a picture counts as known
        self._known_pictures.add(f"{name}+compressed.webp")


def status_of(error: BaseException | None) -> str:
    """MLflow's word for a run that ended with this exception."""
    if isinstance(error, SystemExit):
        return "FINISHED" if error.code in (None, 0) else "KILLED" if error.code in (130, 143) else "FAILED"
    if isinstance(error, (KeyboardInterrupt, errors.Interrupted)):
        return "KILLED"
    return "FINISHED" if error is None else "FAILED"


def address(uri: str | None, out: Path) -> str:
    """`uri` as MLflow may take it from any working directory; None is the database of the runs under `out`."""
    if uri is None:
        return _sqlite_uri(out.resolve() / "mlflow.db")
    path = _sqlite_path(uri)
    if path is None:
        return uri
    _, mark, query = uri.partition("?")
    return _sqlite_uri(path.absolute()) + mark + query


def connect(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """A client of the store at `uri` (from `address`) and the id of `experiment` there; whatever of both is missing is made."""
    mlflow = _mlflow()
    path = _sqlite_path(uri)
    if path is None:
        client = mlflow.MlflowClient(uri, uri)
        return client, _experiment(client, experiment, None)
    # Processes that make the schema at the same time break the database for good.
    with _alone(path.with_suffix(".lock")):
        artifacts = path.parent / "mlartifacts"
        if not path.exists():
            _make_database(path, artifacts)
        client = mlflow.MlflowClient(uri, uri)
        experiment_id = _experiment(client, experiment, str(artifacts))
        _follow_move(path, client.get_experiment(experiment_id).artifact_location, artifacts)
        return client, experiment_id


def is_complete(folder: Path) -> bool:
    """Whether MLflow has all metrics and pictures of the run in `folder`, and how its last attempt ended."""
    sent = _read_note(folder).get("sent")
    shown = (journals.METRICS, journals.PICTURE)
    return sent is not None and not any(
        record["kind"] in shown for _, record in journals.read(folder / journals.FILE_NAME, sent)
    )


def runs_of(folders: Sequence[Path], experiment_id: str | None) -> list[str]:
    """What MLflow calls the runs in these folders, those of the experiment, each once."""
    notes = [_read_note(folder) for folder in folders]
    return list(
        dict.fromkeys(
            note["run_id"] for note in notes if note.get("run_id") and note.get("experiment_id") == experiment_id
        )
    )


def gather(
    uri: str, parent: Sink, folders: Sequence[Path], description: str, artifacts: Sequence[Path], varied: Sequence[str]
) -> None:
    """See `trainer.tracking.gather`."""
    try:
        client = _mlflow().MlflowClient(uri, uri)
        for run_id in runs_of(folders, parent.experiment_id):
            if "mlflow.parentRunId" not in client.get_run(run_id).data.tags:
                client.set_tag(run_id, "mlflow.parentRunId", parent.run_id, synchronous=True)
        for path in artifacts:
            client.log_artifact(parent.run_id, str(path))
        shown = [
            f"![{path.stem}](get-artifact?path={path.name}&run_uuid={parent.run_id})"
            for path in artifacts
            if path.suffix == ".png"
        ]
        client.set_tag(
            parent.run_id, "mlflow.note.content", "\n\n".join([_shorten(description, 7000), *shown]), synchronous=True
        )
        state = view.children(parent.run_id, [_clean(name) for name in varied], *_pictures(folders))
        client.set_experiment_tag(parent.experiment_id, view.TAG + parent.run_id, state)
    except Exception as error:  # whatever goes wrong here, the runs are done and the tables written
        log.warning(
            "MLflow at %s: %s. It lacks the sums of this sweep; the same command sends them.", uri, _one_line(error)
        )


def _pictures(folders: Sequence[Path]) -> tuple[list[str], int]:
    """The keys of the pictures in these folders' journals, and their last step."""
    found = [
        record
        for folder in folders
        for _, record in read(folder / journals.FILE_NAME)
        if record["kind"] == journals.PICTURE
    ]
    return sorted({_picture_key(record) for record in found}), max((record["step"] for record in found), default=0)


def _picture_key(record: dict[str, Any]) -> str:
    """As the picture is called in MLflow."""
    return re.sub(r"[^\w\-./ ]", "_", record["key"], flags=re.ASCII)


NOTE = "tracking.json"
"""Where a run's folder remembers what MLflow calls it."""


def _mlflow() -> ModuleType:
    with _importing:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow

        return mlflow


def _make_database(path: Path, artifacts: Path) -> None:
    """Put an empty MLflow database at `path`, whole or not at all: a schema that a kill left half made can never be opened again."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for name in os.listdir(path.parent):
        if name.startswith(files.PARTIAL) and path.name in name:
            (path.parent / name).unlink()  # left by a kill; its maker held the lock that we hold
    with files.replacing(path) as temporary:
        SqlAlchemyStore(_sqlite_uri(temporary), str(artifacts)).engine.dispose()
        with contextlib.closing(sqlite3.connect(temporary)) as database:
            # With a write-ahead log readers (the UI) and writers (the members of a sweep) do not wait for each other.
            database.execute("PRAGMA journal_mode=WAL")


def _follow_move(path: Path, known: str, artifacts: Path) -> None:
    """Where the folder of the database was moved or renamed, tell the database that its artifacts came along; MLflow has no call for it."""
    if (
        known == str(artifacts)
        or not known.startswith("/")
        or Path(known).name != artifacts.name
        or Path(known).exists()
    ):
        return
    here, there, length = str(artifacts), known, len(known)
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as database, database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (here, length + 1, length, there),
            )


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            # The kind makes the UI open its page for training; as it comes, that for chat applications, which is empty.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.create_experiment(name, artifacts, {**kind, view.TAG + view.RUNS: view.runs()})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        # Its name can be used in no other way.
        client.restore_experiment(found.experiment_id)
        log.info("The MLflow experiment %s had been deleted, and is back.", name)
    if found.tags.get(view.TAG + view.RUNS) != view.runs():
        client.set_experiment_tag(found.experiment_id, view.TAG + view.RUNS, view.runs())
    return found.experiment_id


def _end_dead_runs(client: MlflowClient, experiment_id: str, own: str) -> None:
    """Give an end to the runs of this host that MLflow holds for RUNNING though no process owns their folder: killed, they could not."""
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
        tags = run.data.tags
        if run.info.run_id == own or tags.get("trainer.host") != socket.gethostname():
            continue
        folder = Path(tags.get("trainer.folder", ""))
        if folder.is_absolute() and _is_ownerless(folder / "lock"):
            note = _read_note(folder)
            status = note.get("status") if note.get("run_id") == run.info.run_id else None
            client.set_terminated(run.info.run_id, status or "KILLED", _last_change(folder / journals.FILE_NAME))


def _is_ownerless(lock: Path) -> bool:
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
        return True
    except OSError:  # locked, or not to be had: then nothing is known of its owner
        return False


def _last_change(path: Path) -> int | None:
    try:
        return round(path.stat().st_mtime * 1000)
    except OSError:
        return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Not left to closing: a worker forked in between shares the open file, and would hold the lock as long as it lives.
            fcntl.flock(file, fcntl.LOCK_UN)


def _read_note(folder: Path) -> dict[str, Any]:
    try:
        note = json.loads((folder / NOTE).read_bytes())
    except (OSError, ValueError):
        return {}  # the tag finds the run again
    return note if isinstance(note, dict) else {}


def _sqlite_uri(path: Path) -> str:
    # SQLAlchemy ends the path at ? and decodes % in it.
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def _sqlite_path(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def _source() -> dict[str, str]:
    """Who runs what, as MLflow's UI shows it. Never the command line, which may hold secrets."""
    tags = {"mlflow.source.name": "trainer", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(Exception):
        tags["mlflow.user"] = getpass.getuser()
    checkout = Path(__file__).resolve().parents[2]
    # Installed as a package, the repository around it would be another one.
    if (checkout / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
            tags["mlflow.source.git.commit"] = subprocess.run(
                command, capture_output=True, text=True, timeout=2, check=True
            ).stdout.strip()
    return tags


def _clean(name: str) -> str:
    """A name of a metric, param or tag with nothing in it that MLflow refuses."""
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("./")[:250] or "_"


def _shorten(text: str, length: int) -> str:
    text = str(text)
    note = f"... ({len(text)} characters)"
    return text if len(text) <= length else text[: length - len(note)] + note


def _one_line(error: BaseException) -> str:
    """What went wrong, in a few words: of a failure on the disk or the network its root, which libraries bury under their own."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) and before not in chain:
        chain.append(before)
    roots = [link for link in chain if isinstance(link, (OSError, sqlite3.Error))]
    text = " ".join(str((roots or chain[:1])[-1]).split()) or type(error).__name__
    return text[:300].rstrip(".")
