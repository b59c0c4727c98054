"""What a link of ours opens in MLflow: which columns, and which charts first.

MLflow keeps the state of a page that somebody shares in a tag of the experiment, and a link names it by `viewStateShareKey`. As it comes,
the table of runs has no column for a metric or setting, and charts stand in alphabetical order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

TAG = "mlflow.sharedViewState."
RUNS = "trainer"
"""The key of the view of all runs."""
COLUMNS = ("method.kind", "method.rank", "optimizer.lr", "steps", "dataset.kind")
QUANTILES = tuple(f"val/loss_q{quantile}" for quantile in range(10, 100, 10))


def runs() -> str:
    """All runs, the newest first."""
    return _state(COLUMNS, (), 0, orderByKey="attributes.start_time", orderByAsc=False)


def children(run_id: str, varied: Sequence[str], pictures: Sequence[str], step: int) -> str:
    """The runs under one, the best by held-out loss first, with what varies between them and their `pictures` (keys) of `step`.

    Sorted by time, MLflow would hide them under the collapsed parent.
    """
    return _state(varied, pictures, step, f"tags.mlflow.parentRunId = '{run_id}'", "metrics.`val/loss`", True)


def _state(
    params: Sequence[str],
    pictures: Sequence[str],
    step: int,
    searchFilter: str = "",
    orderByKey: str = "",
    orderByAsc: bool = True,
) -> str:
    charts = [_line("val", "val/loss"), _line("val", "val/psnr"), *(_pictures(key, step) for key in pictures)]
    charts += [_line("quantiles", name) for name in QUANTILES]
    sections = [
        ("val", "val"),
        ("samples", "samples"),
        ("train", "train"),
        ("perf", "perf"),
        ("quantiles", "val/loss by time"),
    ]
    state = {
        "searchFilter": searchFilter,
        "orderByKey": orderByKey,
        "orderByAsc": orderByAsc,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": ["metrics.`val/loss`", "metrics.`val/psnr`", *(f"params.`{name}`" for name in params)],
        "isAccordionReordered": True,
        "compareRunSections": [
            {
                "uuid": key,
                "name": name,
                "display": key != "quantiles",
                "isReordered": True,
                "deleted": False,
                "isGenerated": True,
            }
            for key, name in sections
        ],
        "compareRunCharts": charts,
    }
    return json.dumps(state)


def _chart(kind: str, section: str, name: str) -> dict[str, Any]:
    shared = {"uuid": name, "metricSectionId": section, "displayName": name, "runsCountToCompare": 10}
    return {"type": kind, "deleted": False, "isGenerated": True, **shared}


def _line(section: str, name: str) -> dict[str, Any]:
    axes = {
        "xAxisKey": "step",
        "useGlobalXaxisKey": True,
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
    }
    look = {"scaleType": "linear", "lineSmoothness": 0, "useGlobalLineSmoothing": True, "range": {}}
    return {**_chart("LINE", section, name), "metricKey": name, "selectedMetricKeys": [name], **axes, **look}


def _pictures(name: str, step: int) -> dict[str, Any]:
    # All params of each run would stand above its picture and push it out of sight.
    return {**_chart("IMAGE", "samples", name), "imageKeys": [name], "step": step, "showRunParams": False}
