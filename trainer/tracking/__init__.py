"""What a run shows of itself: the journal in its folder is the truth, MLflow a sink of it, curves and tables are drawn from it."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from trainer.core.errors import UsageError

if TYPE_CHECKING:
    from trainer.tracking.journal import Journal


@dataclass(slots=True)
class Tracking:
    """Where runs are shown; runs that should be compared share an `experiment`."""

    experiment: str = "trainer"


@dataclass(slots=True)
class MLflow(Tracking):
    """MLflow at `uri`: a database (`sqlite:///file.db`, `postgresql://...`) or a server (`http://host:5000`).

    Null is `sqlite:///<out>/mlflow.db`, made at need. Raises errors.UsageError for an address that MLflow could not use or that holds a password.
    """

    uri: str | None = None

    def __post_init__(self) -> None:
        if self.uri is not None:
            _check(self.uri)


@dataclass(slots=True)
class NoTracking(Tracking):
    """The run's own folder only."""


OPTIONS: dict[str, type[Tracking]] = {"mlflow": MLflow, "none": NoTracking}


class Sink:
    """Shows a run's journal somewhere while the context is open; this one shows it nowhere.

    `run_id` and `experiment_id` are the store's own, None until it has answered; `errors` counts what it refused or left unanswered.
    """

    run_id: str | None = None
    experiment_id: str | None = None
    errors: int = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        pass

    def flush(self, timeout: float = 20.0) -> bool:
        """Wait until all that the journal holds by now is shown, at most `timeout` seconds; whether it is."""
        return True


def open_sink(
    settings: Tracking,
    out: Path,
    folder: Path,
    journal: Journal,
    *,
    name: str,
    params: dict[str, str],
    tags: dict[str, str],
    description: str = "",
    parent: str | None = None,
) -> Sink:
    """A context that shows the run in `folder` as its journal grows, and how it ended; it never raises, and training never waits for it.

    `params` are what the run is (written once), `tags` what may change from attempt to attempt. `tags["trainer.folder_id"]` names the
    run for good: by it the run is found again where `folder` does not remember what MLflow calls it. `parent` is the MLflow id of the
    run to show it under. The lock of `folder` must be held: a run whose folder is not locked is taken for dead by the next one.
    """
    if not isinstance(settings, MLflow):
        return Sink()
    from trainer.tracking.sink import MLflowSink

    return MLflowSink(
        settings, out, folder, journal, name=name, params=params, tags=tags, description=description, parent=parent
    )


def page(settings: Tracking, out: Path) -> str | None:
    """Where the runs under `out` are compared: a server's address, or the command that serves their database; None where nothing tracks."""
    if not isinstance(settings, MLflow):
        return None
    if settings.uri and settings.uri.startswith("http"):
        return settings.uri
    asked = {"--out": str(out), "--uri": settings.uri, "--experiment": settings.experiment}
    usual = {"--out": "runs", "--uri": None, "--experiment": MLflow().experiment}
    options = [word for name, value in asked.items() if value != usual[name] for word in (name, value)]
    return shlex.join([_python(), "-m", "trainer.tracking.ui", *options])


def _python() -> str:
    """What calls this interpreter from here."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def links(settings: Tracking, parent: Sink, folders: Sequence[Path]) -> dict[str, str]:
    """Addresses, by title, of the pages that show the runs in these folders beside each other, all under the run of `parent`."""
    if not isinstance(settings, MLflow) or parent.run_id is None:
        return {}
    from trainer.tracking import sink, ui

    base = settings.uri if settings.uri and settings.uri.startswith("http") else f"http://{ui.HOST}:{ui.PORT}"
    found = {
        "summary": ui.run_link(base, parent.experiment_id, parent.run_id),
        "curves and pictures": ui.children_link(base, parent.experiment_id, parent.run_id),
    }
    if runs := sink.runs_of(folders, parent.experiment_id):
        found["comparison"] = ui.compare_link(base, parent.experiment_id, runs)
    return found


def gather(
    settings: Tracking,
    out: Path,
    parent: Sink,
    folders: Sequence[Path],
    *,
    description: str,
    artifacts: Sequence[Path] = (),
    varied: Sequence[str] = (),
) -> None:
    """Put the runs in these folders under the run of `parent` where they are under none, and give that its text and files; never raises.

    Pictures among the files are shown below the text. `varied` are the settings (params) that tell the runs from each other.
    """
    if isinstance(settings, MLflow) and parent.run_id is not None:
        from trainer.tracking import sink

        sink.gather(sink.address(settings.uri, out), parent, folders, description, artifacts, varied)


def _check(uri: str) -> None:
    example = "type tracking.uri=sqlite:///path/to/mlflow.db or tracking.uri=http://host:5000"
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UsageError(f"tracking.uri is no address: {error}; {example}.") from None
    secret = parts.password is not None or (parts.username and parts.scheme in ("http", "https"))
    if secret or re.search(r"(password|token|secret)=", parts.query, re.IGNORECASE):
        # The address itself is left out of the message, which ends up in logs.
        raise UsageError(
            "tracking.uri holds a password, which would end up in logs and run folders. Leave it out and set the environment variables "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) for a server, PGPASSWORD for PostgreSQL."
        )
    if parts.scheme == "sqlite":
        known = re.match(r"sqlite:///[^?]", uri) and ":memory:" not in uri
    elif parts.scheme in ("http", "https"):
        known = parts.netloc
    else:
        known = uri == "databricks" or re.match(r"(databricks|(postgresql|mysql|mssql)(\+\w+)?)://", uri)
    if not known:
        raise UsageError(
            f"tracking.uri={uri} is no MLflow database or server (a folder such as ./mlruns no longer is one); {example}."
        )
