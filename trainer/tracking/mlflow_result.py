"""The result of a run in MLflow: losses and last images in its description, and a view of its curves and images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trainer.tracking import RESULT, journal, mlflow_internals

if TYPE_CHECKING:
    from collections.abc import Collection

    from mlflow import MlflowClient
    from mlflow.entities import RunInfo

DESCRIPTION = "mlflow.note.content"
"""Tag of a run that holds its description."""
MAX_TEXT_LENGTH = 8000
"""Maximum number of characters in a tag or description, a limit of MLflow."""
MAX_IMAGES = 8
"""Maximum number of images in a description."""

_MEASUREMENTS = (("val/loss", ".4g", "", min), ("val/psnr", ".1f", " dB", max))
"""Name, number format, unit, and the function that picks the best value."""


class RunResult:
    """The result of a run so far, collected from its journal.

    Attributes:
        is_new: Whether MLflow does not have the result yet.
        step: Last step that has images; 0 if none has.
    """

    def __init__(self) -> None:
        self.is_new = True  # A run without any measurement has a page too.
        self.step = 0
        self._images: dict[str, float] = {}  # times of the images of `step` by their keys
        self._points: dict[str, list[tuple[int, float]]] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Adds a record of the journal, which must be newer than all records so far."""
        if record["kind"] == journal.METRICS:
            for name, *_ in _MEASUREMENTS:
                if name in record["values"]:
                    self._points.setdefault(name, []).append((record["step"], record["values"][name]))
                    self.is_new = True
        elif record["kind"] == journal.IMAGE and record["step"] >= self.step:
            if record["step"] > self.step:
                self.step, self._images = record["step"], {}
            self._images[record["key"]] = record["time"]
            self.is_new = True

    def show(self, client: MlflowClient, info: RunInfo, uploaded: Collection[str]) -> None:
        """Writes the view of the run and the result part of its description. `uploaded` are names of images.

        A description without the two lines of `RESULT` belongs to the user and stays as it is.
        """
        keys = [mlflow_internals.image_key(key) for key in self._images]
        view = mlflow_internals.run_view(info.run_id, keys, self.step)
        client.set_experiment_tag(info.experiment_id, mlflow_internals.view_tag(info.run_id), view)
        before = client.get_run(info.run_id).data.tags.get(DESCRIPTION, "")
        after = _insert(before, self._paragraphs(info, uploaded))
        if after != before:
            client.set_tag(info.run_id, DESCRIPTION, after, synchronous=True)
        self.is_new = False

    def _paragraphs(self, info: RunInfo, uploaded: Collection[str]) -> list[str]:
        """Returns the result as Markdown: a link with the measurements, and one piece for each image."""
        url = mlflow_internals.page_link(mlflow_internals.charts_url("", info.experiment_id, info.run_id))
        measurements = [
            _describe(self._points[name], name, number, unit, best)
            for name, number, unit, best in _MEASUREMENTS
            if name in self._points
        ]
        names = {key: mlflow_internals.image_name(key, self.step, time) for key, time in self._images.items()}
        images = [
            mlflow_internals.thumbnail_markdown(info.run_id, name, mlflow_internals.image_key(key))
            for key, name in names.items()
            if name in uploaded
        ]
        return [" | ".join([f"**[Images and curves]({url})**", *measurements]), *images[:MAX_IMAGES]]


def _describe(points: list[tuple[int, float]], name: str, number: str, unit: str, choose: Any) -> str:
    """Returns the first, the last and the best value of a measurement in words, the last one in bold type."""
    (first_step, first), (step, last) = points[0], points[-1]
    text = f"**{last:{number}}{unit}** {_when(step)}"
    if len(points) > 1:
        text = f"{first:{number}} {_when(first_step)}, {text}"
    finite = [(value, at) for at, value in points if math.isfinite(value)]
    if finite:
        best, at = choose(finite)
        text += " (best)" if at == step else f", best {best:{number}} {_when(at)}"
    return f"{name} {text}"


def _when(step: int) -> str:
    return f"at step {step}" if step else "before training"


def _insert(description: str, paragraphs: list[str]) -> str:
    """Puts the paragraphs between the lines of `RESULT`, without the images for which there is no space."""
    begin, end = RESULT.split("\n")
    before, found, rest = description.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        return description
    head, *images = paragraphs
    space = MAX_TEXT_LENGTH - len(before) - len(RESULT) - len(after) - len(head) - len("\n\n" * 3)
    while images and len(" ".join(images)) > space:
        images.pop()
    parts = [begin, head, " ".join(images), end]
    text = before + "\n\n".join(part for part in parts if part) + after
    return text if len(text) <= MAX_TEXT_LENGTH else description
