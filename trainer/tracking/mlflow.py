"""`tracking=mlflow`: runs are shown in MLflow. Only opening a tracker imports MLflow itself."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core.settings import path_setting
from trainer.tracking import Tracking
from trainer.tracking.mlflow_uri import check_uri, ignored_variables

if TYPE_CHECKING:
    from trainer.tracking.journal import Journal
    from trainer.tracking.tracker import Tracker


log = logging.getLogger(__name__)


@dataclass(slots=True)
class MLflow(Tracking):
    """MLflow at `uri`: a database (`sqlite:///file.db`, `postgresql://...`) or a server (`http://host:5000`).

    Null is `sqlite:///<out>/mlflow.db`, created when it is first used. Raises errors.UsageError if the URI holds a
    password or if MLflow does not support it.
    """

    uri: str | None = path_setting(None)

    def __post_init__(self) -> None:
        if self.uri is not None:
            check_uri(self.uri)

    def open(
        self,
        journal: Journal,
        out: Path,
        *,
        name: str,
        params: dict[str, str],
        tags: dict[str, str],
        description: str = "",
        parent: str | None = None,
    ) -> Tracker:
        from trainer.tracking.mlflow_run import RunDetails
        from trainer.tracking.mlflow_store import resolve_uri
        from trainer.tracking.mlflow_tracker import MLflowTracker

        if text := ignored_variables():
            log.warning("%s", text)
        details = RunDetails.create(
            journal.path.parent, name=name, params=params, tags=tags, description=description, parent=parent
        )
        return MLflowTracker(resolve_uri(self.uri, out), self.experiment, journal, details)

    def attach(
        self, folder: Path, out: Path, metrics: Mapping[int, Mapping[str, float]], paths: Sequence[Path], name: str
    ) -> str | None:
        from trainer.tracking import mlflow_attach, mlflow_note, mlflow_store

        note, uri = mlflow_note.read_note(folder), mlflow_store.resolve_uri(self.uri, out)
        if not note.get("run_id") or note.get("uri") != uri:
            return f"MLflow at {uri} does not have this run; type the command that trained it, which sends it there"
        return mlflow_attach.attach(uri, note["run_id"], metrics, paths, name)

    def page(self, out: Path) -> str | None:
        if self.uri and self.uri.startswith("http"):
            return self.uri
        values = {"--out": str(out), "--uri": self.uri, "--experiment": self.experiment}
        defaults = {"--out": "runs", "--uri": None, "--experiment": MLflow().experiment}
        options = [
            word
            for name, value in values.items()
            if value is not None and value != defaults[name]
            for word in (name, value)
        ]
        return shlex.join([_python(), "-m", "trainer", "ui", *options])

    def links(self, folder: Path, out: Path) -> dict[str, str]:
        from trainer.tracking import mlflow_internals, mlflow_note, mlflow_store

        if not self._has_received(folder, out):
            return {}
        note = mlflow_note.read_note(folder)
        address = mlflow_store.page_address(note["uri"])
        return {
            "images and curves": mlflow_internals.charts_url(address, note["experiment_id"], note["run_id"]),
            "all runs": mlflow_internals.runs_url(address, note["experiment_id"]),
        }

    def sweep_links(self, folder: Path, run_folders: Sequence[Path]) -> dict[str, str]:
        from trainer.tracking import mlflow_internals, mlflow_note, mlflow_store

        note = mlflow_note.read_note(folder)
        if not note.get("run_id") or not note.get("experiment_id"):
            return {}
        address = mlflow_store.page_address(note["uri"])
        urls = {
            "summary": mlflow_internals.run_url(address, note["experiment_id"], note["run_id"]),
            "curves and pictures": mlflow_internals.charts_url(address, note["experiment_id"], note["run_id"]),
        }
        if runs := mlflow_note.run_ids(run_folders, note["experiment_id"]):
            urls["comparison"] = mlflow_internals.comparison_url(address, note["experiment_id"], runs)
        return urls

    def is_complete(self, folder: Path, out: Path) -> bool:
        from trainer.tracking import mlflow_note, mlflow_store

        if not self._has_received(folder, out):
            return False
        note = mlflow_note.read_note(folder)
        return mlflow_store.has_run(note["uri"], note["run_id"])

    def _has_received(self, folder: Path, out: Path) -> bool:
        """Returns whether everything about the run in `folder` was once sent to this store and experiment."""
        from trainer.tracking import mlflow_note, mlflow_store

        note = mlflow_note.read_note(folder)
        # Notes of earlier versions lack the name of the experiment.
        is_here = note.get("uri") == mlflow_store.resolve_uri(self.uri, out)
        return is_here and note.get("experiment") in (None, self.experiment) and mlflow_note.is_complete(folder)


def _python() -> str:
    """Returns the shortest command that starts this Python interpreter from the working directory."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
