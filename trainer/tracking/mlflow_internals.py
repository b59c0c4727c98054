"""All uses of MLflow's non-public parts, checked with MLflow 3.17.2 (`pyproject.toml` allows no later minor version).

Before you raise the bound, run `tests/test_tracking.py`, `tests/test_mlflow_server.py` and `tests/test_browser.py` with
the new version. This module contains:

- environment variables without documentation,
- the latest step of each metric of a run (`RunData._metric_objs`),
- the file names of images behind the step slider (`MlflowClient.log_image`) and their compression,
- the creation of database tables and the connections to them (`SqlAlchemyStore`), the tables `experiments` and `runs`,
- URLs of pages, and the tags with which the UI chooses and configures a page.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import posixpath
import re
import sqlite3
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Environment variables. By default a client waits up to 248 s for a server that does not answer. The tracker tries
# again by itself, after asking what has arrived.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# Jobs evaluate chat applications. Without them the server starts in a quarter of the time and memory.
SERVER_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


# Metrics


def latest_steps(run: Run) -> dict[str, int]:
    """Returns the latest step of each metric. The public `RunData.metrics` has the values only."""
    return {metric.key: metric.step for metric in run.data._metric_objs}


# Images. `MlflowClient.log_image` writes each image under a new random name, so a second attempt would show it twice.
# The functions below write the same files under a name that depends on key and step only.

_THUMBNAIL_SUFFIX = "+compressed.webp"
# MLflow's own 256 pixels are too few for a strip of images. Two thumbnails fit side by side in a description.
_THUMBNAIL_SIDE = 320


def image_key(key: str) -> str:
    """Returns the name of a series of images without the characters that MLflow refuses."""
    return re.sub(r"[^\w\-./ ]", "_", key, flags=re.ASCII)


def image_name(key: str, step: int, seconds: float) -> str:
    """Returns the file name, without a suffix, that tells the UI the key, step and time (Unix time) of an image."""
    key = image_key(key)
    unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{key} {step}")
    return f"{key.replace('/', '~')}+step+{step}+timestamp+{round(seconds * 1000)}+{unique}"


def encode_image(source: Path) -> tuple[bytes, bytes]:
    """Returns the image at `source` as a PNG file and as a thumbnail. Raises an exception if it cannot be read."""
    import mlflow
    from mlflow.tracking.multimedia import compress_image_size

    image = mlflow.Image(str(source)).to_pil()
    full, thumbnail = io.BytesIO(), io.BytesIO()
    image.save(full, "PNG")
    compress_image_size(image, _THUMBNAIL_SIDE).save(thumbnail, "WEBP")
    return full.getvalue(), thumbnail.getvalue()


def write_image_files(encoded: tuple[bytes, bytes], folder: Path, name: str) -> tuple[Path, Path]:
    """Writes the result of `encode_image` to `folder` and returns the two paths. Raises OSError."""
    paths = folder / f"{name}.png", folder / f"{name}{_THUMBNAIL_SUFFIX}"
    for path, data in zip(paths, encoded, strict=True):
        path.write_bytes(data)
    return paths


def upload_image(client: MlflowClient, run_id: str, image_files: tuple[Path, Path], first: bool) -> None:
    """Uploads the files from `write_image_files`. The `first` image of a run makes the UI look for images."""
    if first:
        client.set_tag(run_id, "mlflow.loggedImages", "True", synchronous=True)
    # The thumbnail comes last, because it marks an image as uploaded.
    for path in image_files:
        client.log_artifact(run_id, str(path), "images")


def uploaded_images(client: MlflowClient, run_id: str) -> set[str]:
    """Returns the names (see `image_name`) of the images that were uploaded completely."""
    names = [posixpath.basename(file.path) for file in client.list_artifacts(run_id, "images")]
    return {name.removesuffix(_THUMBNAIL_SUFFIX) for name in names if name.endswith(_THUMBNAIL_SUFFIX)}


# Databases


def create_database(path: Path, uri: str, artifacts: str) -> None:
    """Creates a SQLite database with MLflow's tables at `path`; `uri` is the URI of `path`.

    MLflow has no public function that creates a database and closes it again.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, artifacts).engine.dispose()
    with contextlib.closing(sqlite3.connect(path)) as database:
        # With a write-ahead log, readers (the UI) and writers (the members of a sweep) do not wait for each other.
        database.execute("PRAGMA journal_mode=WAL")


def close_database(uri: str) -> None:
    """Closes the connections to a SQLite database, which MLflow keeps open although its file may be deleted."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if engine := SqlAlchemyStore._engine_map.get(uri):
        engine.dispose()


def database_has_run(path: Path, run_id: str) -> bool:
    """Returns whether the SQLite database at `path` has a run, without importing MLflow. Raises sqlite3.Error."""
    address = f"file:{quote(str(path))}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=5)) as database:
        return database.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone() is not None


def move_artifacts(path: Path, old: str, new: str) -> None:
    """Replaces the artifact folder `old` with `new` in the SQLite database at `path`, which MLflow cannot do."""
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as database, database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (new, len(old) + 1, len(old), old),
            )


# Pages. Without the workflow type, MLflow opens an empty page for chat applications.

_WORKFLOW = {"workflowType": "machine_learning"}


def runs_url(address: str, experiment_id: str) -> str:
    """Returns the URL of the page with all runs of an experiment, see `runs_view`."""
    return _page(address, f"experiments/{experiment_id}/runs", viewStateShareKey=_RUNS_VIEW)


def run_url(address: str, experiment_id: str, run_id: str) -> str:
    """Returns the URL of the page of one run."""
    return _page(address, f"experiments/{experiment_id}/runs/{run_id}")


def charts_url(address: str, experiment_id: str, run_id: str) -> str:
    """Returns the URL of the curves and images of a run (`run_view`) or its children (`children_view`)."""
    return _page(address, f"experiments/{experiment_id}/runs", viewStateShareKey=run_id, compareRunsMode="CHART")


def comparison_url(address: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Returns the URL of the page that compares runs."""
    # MLflow expects the runs to come first.
    query = {"runs": json.dumps(run_ids), "experiments": json.dumps([experiment_id]), **_WORKFLOW}
    return f"{address.rstrip('/')}/#/compare-runs?{urlencode(query, quote_via=quote)}"


def _page(address: str, path: str, **query: str) -> str:
    return f"{address.rstrip('/')}/#/{path}?{urlencode({**_WORKFLOW, **query})}"


def page_link(url: str) -> str:
    """Returns the link to a page in a description. It is relative, since the server's address may change."""
    return "#" + url.partition("#")[2]


def image_markdown(run_id: str, path: str, title: str) -> str:
    """Returns Markdown that shows the artifact at `path` of a run in the description of that run."""
    return f"![{title}](get-artifact?path={quote(path)}&run_uuid={run_id})"


def thumbnail_markdown(run_id: str, name: str, title: str) -> str:
    """Returns Markdown that shows the thumbnail of an uploaded image; `name` is its `image_name`."""
    return image_markdown(run_id, f"images/{name}{_THUMBNAIL_SUFFIX}", title)


# Views. MLflow stores the state of a page that a user shares in a tag of the experiment, and the URL names the tag by
# `viewStateShareKey`. A view of our own adds columns of metrics and params to the table of runs, and puts the important
# charts first. The tags are compressed as MLflow compresses them, since every page loads all tags of its experiment. A
# filter in the URL would make MLflow ignore the view, so each run has a view of its own.

_VIEW_TAG = "mlflow.sharedViewState."
_RUNS_VIEW = "trainer"
RUNS_VIEW_TAG = _VIEW_TAG + _RUNS_VIEW
"""Tag of an experiment that holds `runs_view`."""
_COLUMNS = ("method.kind", "method.rank", "optimizer.lr", "steps", "dataset.kind")
# One run: on a laptop's screen, the first row of images begins below the curves and shows four whole thumbnails.
_LAYOUT_OF_RUN = {"val": {"columns": 2, "cardHeight": 280}, "samples": {"columns": 4, "cardHeight": 420}}
_LOSSES_BY_TIME = tuple(f"val/loss_q{quantile}" for quantile in range(10, 100, 10))


def view_tag(run_id: str) -> str:
    """Returns the tag of an experiment that holds the `run_view` or `children_view` of a run, see `charts_url`."""
    return _VIEW_TAG + run_id


def runs_view() -> str:
    """Returns the view of all runs of an experiment, the newest first."""
    return _view(_COLUMNS, (), 0, order_by="attributes.start_time", ascending=False)


def run_view(run_id: str, images: Sequence[str], step: int) -> str:
    """Returns the view of one run: held-out curves, the `images` (keys) of `step`, and then the other curves."""
    # Sorted by time, a run that has a parent would be hidden below it. The list of runs would displace the images.
    search_filter = f"attributes.run_id = '{run_id}'"
    return _view(_COLUMNS, images, step, search_filter, "metrics.`val/loss`", show_runs=False, layout=_LAYOUT_OF_RUN)


def children_view(run_id: str, params: Sequence[str], images: Sequence[str], step: int, count: int) -> str:
    """Returns the view of the `count` children of a run, those with the lowest held-out loss first.

    The view has columns for the `params` and shows the `images` (keys) of `step`. MLflow itself lists the images of a
    chart in the reverse order.
    """
    # If the children were sorted by time, MLflow would hide them below their collapsed parent.
    search_filter = f"tags.mlflow.parentRunId = '{run_id}'"
    # A chart as wide as the page shows two or three whole thumbnails per row. Those of the best child come last, so
    # there is room for all rows.
    rows = min(4, -(-count // 2))
    layout = {"val": {"columns": 2, "cardHeight": 400}, "samples": {"columns": 1, "cardHeight": 110 + 360 * rows}}
    return _view(params, images, step, search_filter, "metrics.`val/loss`", layout=layout)


def _view(
    params: Sequence[str],
    images: Sequence[str],
    step: int,
    search_filter: str = "",
    order_by: str = "",
    ascending: bool = True,
    show_runs: bool = True,
    layout: Mapping[str, dict[str, int]] | None = None,
) -> str:
    charts = [_line_chart("val", "val/loss"), _line_chart("val", "val/psnr")]
    charts += [_image_chart(key, step) for key in images]
    charts += [_line_chart("quantiles", name) for name in _LOSSES_BY_TIME]
    sections = {
        "val": "val",
        "samples": "samples",
        "train": "train",
        "quantiles": "val/loss by time",
        "perf": "perf",
    }
    state = {
        "searchFilter": search_filter,
        "orderByKey": order_by,
        "orderByAsc": ascending,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": ["metrics.`val/loss`", "metrics.`val/psnr`", *(f"params.`{name}`" for name in params)],
        "runListHidden": not show_runs,
        "isAccordionReordered": True,
        "compareRunSections": [
            {
                "uuid": key,
                "name": name,
                "display": key != "quantiles",
                "isReordered": True,
                "deleted": False,
                "isGenerated": True,
                **(layout or {}).get(key, {}),
            }
            for key, name in sections.items()
        ],
        "compareRunCharts": charts,
    }
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()


def _chart(kind: str, section: str, name: str) -> dict[str, Any]:
    shared = {"uuid": name, "metricSectionId": section, "displayName": name, "runsCountToCompare": 10}
    return {"type": kind, "deleted": False, "isGenerated": True, **shared}


def _line_chart(section: str, name: str) -> dict[str, Any]:
    axes = {
        "xAxisKey": "step",
        "useGlobalXaxisKey": True,
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
    }
    look = {"scaleType": "linear", "lineSmoothness": 0, "useGlobalLineSmoothing": True, "range": {}}
    return {**_chart("LINE", section, name), "metricKey": name, "selectedMetricKeys": [name], **axes, **look}


def _image_chart(key: str, step: int) -> dict[str, Any]:
    # By default the params of each run stand above its image and push it out of sight.
    return {**_chart("IMAGE", "samples", key), "imageKeys": [key], "step": step, "showRunParams": False}


# The kind makes the UI open the page for training instead of the one for chat applications.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development", RUNS_VIEW_TAG: runs_view()}
"""Tags of a new experiment."""
