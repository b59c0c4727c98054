"""The MLflow tracker: a thread reads the journal, asks MLflow what it has, and sends the rest.

Nothing arrives twice: a point carries the time in the journal, so MLflow's databases store a point that is sent twice
as one row, and the file name of an image depends on its key and step only. Nothing is lost: after any failure, and in
the next attempt, the thread asks MLflow again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from trainer.core import errors
from trainer.tracking import RESULT, mlflow_internals, mlflow_store
from trainer.tracking.journal import FILE_NAME, IMAGE, Journal, read_records
from trainer.tracking.mlflow_note import read_note, run_ids, write_note
from trainer.tracking.mlflow_run import RemoteRun, RunDetails, clean_name, describe_run, find_run, shorten
from trainer.tracking.mlflow_store import root_cause
from trainer.tracking.tracker import Tracker

PERIOD = 2.0
"""Seconds between two batches."""
MAX_PAUSE = 60.0
"""Maximum seconds between two attempts while MLflow does not answer. The pause starts at twice PERIOD and doubles."""
PATIENCE = 20.0
"""Seconds without progress after which the end of a run stops waiting for MLflow."""
MAX_WAIT = 300.0
"""Seconds in total after which the end of a run stops waiting for MLflow, even if it makes progress."""
PATIENCE_INTERRUPTED = 2.0
"""Seconds in total that an interrupted run waits for MLflow, since it has to save and exit within seconds."""

log = logging.getLogger(__name__)


class MLflowTracker(Tracker):
    """Shows the run of a journal in MLflow, from a thread of its own.

    Attributes:
        uri: Address of the MLflow store (see `mlflow_store.resolve_uri`).
        experiment_id: MLflow's ID of the experiment; None until MLflow has answered.
    """

    def __init__(self, uri: str, experiment: str, journal: Journal, details: RunDetails):
        self.uri = uri
        self.experiment_id: str | None = None
        self._experiment = experiment
        self._journal = journal.path.resolve()
        self._details = details
        self._failing = False
        self._database_file: tuple[int, int] | None = None
        self._sent = 0  # bytes of the journal that MLflow has received
        self._last_progress = time.monotonic()
        self._is_imported = False
        self._final_status: str | None = None
        self._abandoned = False
        self._wake = threading.Event()
        # A daemon thread, because a request that hangs must not keep the process from exiting.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._final_status = status_of(error)
        self._wake.set()
        begin = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.05)
            if self._final_status == "KILLED":
                deadline = begin + PATIENCE_INTERRUPTED
            elif self._is_imported:
                deadline = min(max(begin, self._last_progress) + PATIENCE, begin + MAX_WAIT)
            else:
                # On a slow disk this takes long, and MLflow has not been asked yet.
                deadline = begin + MAX_WAIT
            if time.monotonic() > deadline:
                self._abandon()
                return

    def flush(self, timeout: float = 20.0) -> bool:
        size = self._journal.stat().st_size
        deadline = time.monotonic() + timeout
        self._wake.set()
        while self._sent < size and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._sent >= size

    def log_children(
        self,
        folders: Sequence[Path],
        *,
        description: str,
        artifacts: Sequence[Path] = (),
        varied: Sequence[str] = (),
        pruned: Mapping[Path, str] | None = None,
    ) -> bool:
        if self.run_id is None:
            return False
        try:
            client = mlflow_store.import_mlflow().MlflowClient(self.uri, self.uri)
            for run_id in run_ids(folders, self.experiment_id):
                if "mlflow.parentRunId" not in client.get_run(run_id).data.tags:
                    client.set_tag(run_id, "mlflow.parentRunId", self.run_id, synchronous=True)
            for folder, when in (pruned or {}).items():
                for run_id in run_ids([folder], self.experiment_id):
                    client.set_tag(run_id, "pruned", when, synchronous=True)
            for path in artifacts:
                client.log_artifact(self.run_id, str(path))
            images = [path for path in artifacts if path.suffix == ".png"]
            shown = [mlflow_internals.image_markdown(self.run_id, path.name, path.stem) for path in images]
            note = "\n\n".join([shorten(description, 7000), *shown])
            client.set_tag(self.run_id, "mlflow.note.content", note, synchronous=True)
            view = mlflow_internals.children_view(
                self.run_id, [clean_name(name) for name in varied], *_last_images(folders), len(folders)
            )
            client.set_experiment_tag(self.experiment_id, mlflow_internals.view_tag(self.run_id), view)
            return True
        except Exception as error:  # the runs are complete and the tables are written, whatever fails here
            log.warning(
                "MLflow at %s: %s. It does not have the summary of this sweep; run the same command again to send it.",
                self.uri,
                root_cause(error),
            )
            return False

    # In the thread

    def _work(self) -> None:
        remote: RemoteRun | None = None
        pause = PERIOD
        while not self._abandoned:
            final_status = self._final_status  # read first, so that everything journaled before it is sent below
            try:
                if remote is None:
                    remote = self._open()
                for offset in remote.send(self._journal):
                    if offset:
                        self._sent = offset
                    else:
                        self._last_progress = time.monotonic()
                if final_status:
                    remote.client.set_terminated(remote.run_id, final_status)
                self._check_database()
                if final_status:
                    self._write_note(status=final_status, sent=self._sent)
                if self._failing:
                    log.info("MLflow at %s answers again and has received everything.", self.uri)
                    self._failing = False
                if final_status:
                    return
                pause = PERIOD
            except Exception as error:  # training must not notice any failure here
                # It is unknown what has arrived, so the next attempt starts by asking MLflow.
                remote, self._sent = None, 0
                self.errors += 1
                if not self._failing and not self._abandoned:
                    log.warning(
                        "MLflow at %s: %s. Training continues; the missing records are sent when MLflow is back.",
                        self.uri,
                        root_cause(error),
                    )
                self._failing = True
                pause = min(2 * pause, MAX_PAUSE)
            self._wake.wait(0.5 if self._final_status else pause)
            self._wake.clear()

    def _open(self) -> RemoteRun:
        """Finds or creates the run in MLflow."""
        mlflow_store.import_mlflow()
        self._is_imported = True
        self._note_answer()
        client, self.experiment_id = mlflow_store.connect(self.uri, self._experiment)
        self._database_file = mlflow_store.database_file(self.uri)
        self._note_answer()
        run = find_run(client, self.uri, self.experiment_id, self._details)
        if run is None:
            run = client.create_run(self.experiment_id, self._start_time(), self._details.tags, self._details.name)
        self.run_id = run.info.run_id
        self._write_note()
        describe_run(client, run, self._details)
        with contextlib.suppress(Exception):  # cleaning up after other runs must not keep this run from being shown
            mlflow_store.end_dead_runs(client, self.experiment_id, self.run_id)
        self._note_answer()
        return RemoteRun(client, run, RESULT in self._details.description)

    def _check_database(self) -> None:
        """Raises errors.StorageError if the file of the database is not the one that was opened.

        SQLite goes on writing to a file that has been deleted.
        """
        if mlflow_store.database_file(self.uri) != self._database_file:
            raise errors.StorageError("the database has been replaced by another one")

    def _note_answer(self) -> None:
        """Extends the wait for MLflow, unless something has failed: a store may answer but refuse writes.

        After a failure, only what MLflow receives extends it.
        """
        if not self._failing:
            self._last_progress = time.monotonic()

    def _start_time(self) -> int | None:
        """Returns the time of the first record in milliseconds, which may be long before MLflow answered."""
        _, first = next(read_records(self._journal), (0, None))
        return round(1000 * first["time"]) if first else None

    def _write_note(self, **ending: Any) -> None:
        store: dict[str, Any] = {"uri": self.uri, "experiment": self._experiment, "experiment_id": self.experiment_id}
        write_note(self._details.folder, store | {"run_id": self.run_id} | ending)

    def _abandon(self) -> None:
        """Lets the run end although MLflow does not have all of it."""
        self._abandoned = True
        log.warning(
            "MLflow at %s does not answer and does not have the end of this run. %s has everything; run the same "
            "command again to send it.",
            self.uri,
            self._journal,
        )
        # MLflow still shows the run as running. The next run that finds it there takes the status from the note.
        folder = self._details.folder
        write_note(folder, {**read_note(folder), "status": self._final_status, "sent": None})


def status_of(error: BaseException | None) -> str:
    """Returns MLflow's status for a run that ended with this exception."""
    if isinstance(error, SystemExit):
        return "FINISHED" if error.code in (None, 0) else "KILLED" if error.code in (130, 143) else "FAILED"
    if isinstance(error, (KeyboardInterrupt, errors.Interrupted)):
        return "KILLED"
    return "FINISHED" if error is None else "FAILED"


def _last_images(folders: Sequence[Path]) -> tuple[list[str], int]:
    """Returns the keys of the images in the journals of `folders`, and the last step that has images."""
    keys, last_step = set(), 0
    for folder in folders:
        for _, record in read_records(folder / FILE_NAME):
            if record["kind"] == IMAGE:
                keys.add(mlflow_internals.image_key(record["key"]))
                last_step = max(last_step, record["step"])
    return sorted(keys), last_step
