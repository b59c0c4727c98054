"""Helpers for tests of the MLflow tracker: fake training, and what MLflow has of a run."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.tracking import ui
from trainer.tracking.journal import Journal
from trainer.tracking.mlflow import MLflow
from trainer.tracking.mlflow_tracker import MLflowTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

TIMEOUT = 120
"""Seconds that no wait in these tests exceeds, even on a busy machine."""


def open_tracker(folder: Path, journal: Journal, uri: str | None = None, **options: Any) -> MLflowTracker:
    """Opens a tracker for the run in `folder`, in an experiment with the name of the folder."""
    settings = MLflow(experiment=folder.name, uri=uri)
    defaults = {"name": "a run", "params": {"optimizer.lr": "0.001"}, "tags": {"trainer.folder_id": folder.name}}
    tracker = settings.open(journal, folder.parent, **(defaults | options))
    assert isinstance(tracker, MLflowTracker)
    return tracker


def log_steps(journal: Journal, *steps: int) -> None:
    for step in steps:
        journal.log_metrics(step, {"train/loss": 1 / step, "perf/steps_per_second": float("nan")})


def log_image(folder: Path, journal: Journal, step: int) -> None:
    import numpy
    from matplotlib.image import imsave

    (folder / "pictures").mkdir(exist_ok=True)
    imsave(folder / f"pictures/{step}.png", numpy.full((16, 16, 3), step % 256, dtype=numpy.uint8))
    journal.log_image(step, "samples/make it night, [now]", f"pictures/{step}.png", "make it night")


def client_of(tracker: MLflowTracker) -> MlflowClient:
    # Not imported above: MLflow starts threads, and other tests in this process fork.
    from mlflow import MlflowClient

    return MlflowClient(tracker.uri)


def status_in_mlflow(tracker: MLflowTracker) -> str:
    return client_of(tracker).get_run(tracker.run_id).info.status


def steps_in_mlflow(tracker: MLflowTracker) -> dict[str, list[int]]:
    """Returns the steps of each metric, including duplicates."""
    client = client_of(tracker)
    keys = client.get_run(tracker.run_id).data.metrics
    return {key: sorted(point.step for point in client.get_metric_history(tracker.run_id, key)) for key in keys}


def images_in_mlflow(tracker: MLflowTracker) -> list[str]:
    """Returns "key step suffix" of each file behind the step slider of the UI."""
    paths = [file.path for file in client_of(tracker).list_artifacts(tracker.run_id, "images")]
    parts = [path.removeprefix("images/").split("+") for path in paths]
    return sorted(f"{part[0].replace('~', '/')} {part[2]} {part[-1].rpartition('.')[2]}" for part in parts)


def view_state(view: str) -> dict[str, Any]:
    """Returns the state of a page from the tag of an experiment, which is compressed as MLflow's own are."""
    return json.loads(zlib.decompress(base64.b64decode(view.removeprefix("deflate;"))))


@contextlib.contextmanager
def server(out: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Serves the database in `out`; the context starts when the server answers."""
    address = f"http://127.0.0.1:{port}"
    with (
        open(out / "server.log", "ab") as output,
        ui.serving(f"sqlite:///{out}/mlflow.db", address, out, output) as process,
    ):
        deadline = time.monotonic() + TIMEOUT
        while not ui.answers(address):
            assert process.poll() is None and time.monotonic() < deadline, (out / "server.log").read_text()
            time.sleep(0.1)
        yield process
