"""One run in MLflow: find it, describe it, and send it the records of the journal that it does not have."""

from __future__ import annotations

import contextlib
import errno
import getpass
import logging
import posixpath
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trainer.tracking import journal, mlflow_internals
from trainer.tracking.mlflow_note import read_note
from trainer.tracking.mlflow_result import DESCRIPTION, MAX_TEXT_LENGTH, RunResult
from trainer.tracking.mlflow_store import root_cause

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

MAX_METRICS = 1000
"""Maximum number of metrics in one request, a limit of MLflow."""
MAX_PARAM_LENGTH = 6000
"""Maximum number of characters in the value of a param, a limit of MLflow."""

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunDetails:
    """Everything that MLflow shows about a run except metrics and images, in a form that MLflow accepts.

    `folder` is the absolute path of the run folder.
    """

    folder: Path
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    description: str

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        name: str,
        params: dict[str, str],
        tags: dict[str, str],
        description: str,
        parent: str | None,
    ) -> Self:
        """Returns the details in a form that MLflow accepts, with the tags that identify the run.

        For the arguments see `Tracking.open`."""
        folder = folder.resolve()
        host = socket.gethostname()
        # The default of trainer.folder_id is the location of the folder.
        own = {"trainer.folder": str(folder), "trainer.host": host, "trainer.folder_id": f"{host}:{folder}"}
        if parent:
            own["mlflow.parentRunId"] = parent
        return cls(
            folder,
            name,
            {clean_name(key): shorten(value, MAX_PARAM_LENGTH) for key, value in params.items()},
            {clean_name(key): shorten(value, MAX_TEXT_LENGTH) for key, value in {**own, **tags}.items()},
            shorten(description, MAX_TEXT_LENGTH),
        )


def find_run(client: MlflowClient, uri: str, experiment_id: str, details: RunDetails) -> Run | None:
    """Returns the run of the folder if the experiment has it, found by the note in the folder or by its tag."""
    from mlflow.exceptions import MlflowException

    note = read_note(details.folder)
    run_id = note.get("run_id")
    if run_id and note.get("experiment_id") == experiment_id and note.get("uri") == uri:
        try:
            run = client.get_run(run_id)
            # The ID alone proves nothing: the address may serve another store by now.
            if run.info.experiment_id == experiment_id and run.info.lifecycle_stage == "active":
                return run
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    # A process that is killed after creating a run and before writing the note leaves a run that only the tag can find.
    folder_id = details.tags["trainer.folder_id"].replace("'", "\\'")
    runs = client.search_runs(
        [experiment_id], f"tags.`trainer.folder_id` = '{folder_id}'", max_results=1, order_by=["start_time ASC"]
    )
    return runs[0] if runs else None


def describe_run(client: MlflowClient, run: Run, details: RunDetails) -> None:
    """Writes the params and tags of a run and marks it as running."""
    from mlflow.entities import Param, RunTag

    known = run.data.params
    changed = sorted(key for key, value in details.params.items() if known.get(key, value) != value)
    if changed:
        log.warning("MLflow keeps the first values of %s, because params are written only once.", ", ".join(changed))
    params = [Param(key, value) for key, value in details.params.items() if key not in known]
    tags = {**_source_tags(), **details.tags}
    # The user may have edited the description in the UI, so an existing one stays.
    if details.description and DESCRIPTION not in run.data.tags:
        tags[DESCRIPTION] = details.description
    client.log_batch(
        run.info.run_id, params=params, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True
    )
    client.update_run(run.info.run_id, status="RUNNING")


class RemoteRun:
    """Sends a journal to an MLflow run.

    `run` is what MLflow has at the moment. After an exception it is unknown what MLflow has, so the object is useless:
    get the run again and create a new object. With `shows_result` the description and the view of the run follow its
    measurements.
    """

    def __init__(self, client: MlflowClient, run: Run, shows_result: bool):
        self.client = client
        self.run_id: str = run.info.run_id
        self._info = run.info
        self._result = RunResult() if shows_result else None
        self._offset = 0
        # Each metric is sent in the order of its steps and each batch arrives whole, so the latest step tells what has
        # arrived.
        self._latest_steps = mlflow_internals.latest_steps(run)
        self._unsent_images: list[dict[str, Any]] = []
        self._sent_images: set[str] | None = None

    def send(self, path: Path) -> Iterator[int]:
        """Sends the records of the journal at `path` that MLflow does not have.

        Yields 0 whenever MLflow has received metrics or an image, and at the end the number of bytes of the journal
        that it has received.
        """
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        for offset, record in journal.read_records(path, self._offset):
            self._offset = offset
            if self._result:
                self._result.add(record)
            if record["kind"] == journal.METRICS:
                step, milliseconds = record["step"], round(record["time"] * 1000)
                for key, value in record["values"].items():
                    key = clean_name(key)
                    if step > self._latest_steps.get(key, -1):
                        self._latest_steps[key] = step
                        metrics.append(Metric(key, value, milliseconds, step))
                if len(metrics) >= MAX_METRICS:
                    self._send_metrics(metrics[:MAX_METRICS])
                    del metrics[:MAX_METRICS]
                    yield 0
            elif record["kind"] == journal.IMAGE:
                self._unsent_images.append(record)
            elif record["kind"] == "warning" and "alert" in record:
                name = clean_name(f"alert.{record['alert']}")
                self.client.set_tag(self.run_id, name, shorten(record["text"], MAX_TEXT_LENGTH), synchronous=True)
        if metrics:
            self._send_metrics(metrics)
            yield 0
        # Images come last, one request each: if MLflow refuses them, it has the metrics all the same.
        for record in self._unsent_images:
            if self._send_image(path.parent, record):
                yield 0
        self._unsent_images.clear()
        if self._result and self._result.is_new:
            self._show_result(self._result)
        yield self._offset

    def _send_metrics(self, metrics: list[Metric]) -> None:
        self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)

    def _send_image(self, folder: Path, record: dict[str, Any]) -> bool:
        """Returns whether the image was sent; it is not if MLflow has it already or if the file is damaged."""
        if self._sent_images is None:
            self._sent_images = mlflow_internals.uploaded_images(self.client, self.run_id)
        name = mlflow_internals.image_name(record["key"], record["step"], record["time"])
        if name in self._sent_images:
            return False
        try:
            encoded = mlflow_internals.encode_image(folder / record["path"])
        except Exception as error:
            # A missing or damaged image stays so: trying again would never end. Other errors of the disk may pass.
            is_damaged = not isinstance(error, OSError) or error.errno in (None, *_MISSING)
            if not is_damaged or isinstance(error, MemoryError):
                raise
            log.warning("MLflow does not get the image %s: %s.", record["path"], root_cause(error))
            return False
        # If the disk for temporary files is full, the image is sent later like all else that is missing.
        with tempfile.TemporaryDirectory() as temporary:
            image_files = mlflow_internals.write_image_files(encoded, Path(temporary), name)
            mlflow_internals.upload_image(self.client, self.run_id, image_files, first=not self._sent_images)
        self._sent_images.add(name)
        return True

    def _show_result(self, result: RunResult) -> None:
        from mlflow.exceptions import MlflowException

        try:
            result.show(self.client, self._info, self._sent_images or set())
        except MlflowException as error:
            # Without permission to change the tags of the experiment, for example, trying again would never end.
            if error.get_http_status_code() not in (400, 403):
                raise
            log.warning("MLflow does not show the result of this run in its description: %s.", root_cause(error))
            self._result = None


def clean_name(name: str) -> str:
    """Returns the name of a metric, param or tag without the characters that MLflow refuses."""
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("./")[:250] or "_"


def shorten(text: str, length: int) -> str:
    """Returns the text, cut to `length` characters with a remark on its real length."""
    text = str(text)
    remark = f"... ({len(text)} characters)"
    return text if len(text) <= length else text[: length - len(remark)] + remark


def _source_tags() -> dict[str, str]:
    """Returns the tags that the UI shows as the source of a run, without the command line, which may hold secrets."""
    tags = {"mlflow.source.name": "trainer", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(Exception):
        tags["mlflow.user"] = getpass.getuser()
    checkout = Path(__file__).resolve().parents[2]
    # An installed package may lie inside a repository of another project.
    if (checkout / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
            tags["mlflow.source.git.commit"] = done.stdout.strip()
    return tags
