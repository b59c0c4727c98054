"""Adds measurements and files to an MLflow run that has ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.tracking import mlflow_store
from trainer.tracking.mlflow_run import MAX_METRICS, clean_name


def attach(
    uri: str, run_id: str, metrics: Mapping[int, Mapping[str, float]], paths: Sequence[Path], folder: str
) -> str | None:
    """Logs step -> name -> value, and files as artifacts in `folder`.

    Returns why MLflow does not have them; None if it does. A metric that is logged again at the same step gets another
    point, and MLflow shows the latest.
    """
    if not mlflow_store.has_run(uri, run_id):
        return f"MLflow at {uri} does not have this run"
    try:
        client = mlflow_store.import_mlflow().MlflowClient(uri, uri)
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        points = [
            Metric(clean_name(name), value, now, step)
            for step, values in metrics.items()
            for name, value in values.items()
        ]
        for start in range(0, len(points), MAX_METRICS):
            client.log_batch(run_id, metrics=points[start : start + MAX_METRICS], synchronous=True)
        for path in paths:
            client.log_artifact(run_id, str(path), folder)
    except Exception as error:  # errors of MLflow, its HTTP library and SQLAlchemy have no common base class
        return f"MLflow at {uri}: {mlflow_store.root_cause(error)}"
    return None
