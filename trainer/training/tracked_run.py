"""How a run appears in the tracker: title, parameters, tags and description."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config.groups import option_name
from trainer.config.identity import flatten, to_plain
from trainer.config.schema import Run
from trainer.core import documents
from trainer.core.console import print_line
from trainer.core.errors import DataError
from trainer.tracking import RESULT
from trainer.tracking.journal import Journal
from trainer.tracking.tracker import Tracker
from trainer.training.run_folder import RunFolder

ATTEMPT_SETTINGS = ("hardware", "evaluation", "sample", "save", "log", "alerts")
"""Settings that may differ between the attempts at one run."""
_NOT_IN_TITLE = {
    *("stage", "out", "name", "fresh", "resume", "hydra", "sweep", "export", "tracking", "cache"),
    *ATTEMPT_SETTINGS,
}


def open_tracker(
    run: Run, run_folder: RunFolder, journal: Journal, overrides: Sequence[str], parent_run: str | None
) -> Tracker:
    """Returns the tracker of a run. Its journal must have an attempt.

    `parent_run` is the tracker's ID of the sweep that the run belongs to, if any.
    """
    attempt = last_attempt(journal)
    settings = flatten(run_folder.manifest["settings"])
    return run.tracking.open(
        journal,
        Path(run.out),
        name=run_title(run, run_folder.id, overrides),
        params={name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()},
        tags=run_tags(run, run_folder, attempt["number"], attempt["machine"]),
        description=describe_run(run, run_folder.path, attempt["counts"]),
        parent=parent_run,
    )


def last_attempt(journal: Journal) -> dict[str, Any]:
    """Returns the record of the last attempt at a run. Raises errors.DataError if the journal has none, or damaged."""
    attempts = [record for record in journal.records() if record["kind"] == "attempt"]
    if not attempts:
        raise DataError(
            f"{journal.path} has no attempt at the run. Restore the file, or type fresh=true to start anew."
        )
    attempt, where = attempts[-1], f"{journal.path}: attempt"
    documents.entry(attempt, "number", int, where)
    documents.entry(attempt, "counts", str, where)
    machine = documents.entry(attempt, "machine", dict, where)
    for name in ("program", "host", "device", "platform", "python"):
        documents.entry(machine, name, str, where)
    documents.entry(machine, "threads", int, where)
    documents.entry(machine, "packages", dict, where)
    documents.expect(machine.get("git"), str | None, f"{where}: git")
    return attempt


def send_missing_records(run: Run, run_folder: RunFolder, overrides: Sequence[str], parent_run: str | None) -> None:
    """Sends the rest of a finished run to the tracker, which may have been unavailable during training.

    Prints the pages of the run.
    """
    if not run.tracking.is_complete(run_folder.path, Path(run.out)):
        with Journal(run_folder.path) as journal, open_tracker(run, run_folder, journal, overrides, parent_run):
            print_line("sending the rest of this run to the tracker")
    print_pages(run, run_folder.path)


def print_pages(run: Run, folder: Path) -> None:
    """Prints where the tracker shows the run in `folder`; nothing if there is no tracker."""
    page = run.tracking.page(Path(run.out))
    links = run.tracking.links(folder, Path(run.out))
    for title, url in links.items():
        print_line(f"{title}: {url}")
    if page and not links:
        print_line(f"compare runs: {page}")
    elif page and not page.startswith("http"):
        print_line(f"these pages are served by: {page}")


def run_title(run: Run, id: str, overrides: Sequence[str]) -> str:
    """Returns `name`, or the overrides that affect the result, which distinguish the run from others in a list."""
    if run.name:
        return run.name
    typed = [
        text.lstrip("+")
        for text in overrides
        if text.lstrip("+~").partition("=")[0].partition(".")[0] not in _NOT_IN_TITLE
    ]
    return f"{shorten_overrides(typed)[:240] or 'defaults'} [{id[:6]}]"


def shorten_overrides(overrides: Sequence[str]) -> str:
    """Shortens `optimizer.lr=1e-4 method.rank=4` to `lr=1e-4 rank=4`. Ambiguous keys stay complete."""
    last_parts = Counter(text.partition("=")[0].rpartition(".")[2] for text in overrides)
    shortened = []
    for text in overrides:
        key, mark, value = text.partition("=")
        last_part = key.rpartition(".")[2]
        shortened.append((key if last_parts[last_part] > 1 else last_part) + mark + value)
    return " ".join(shortened)


def run_tags(run: Run, run_folder: RunFolder, attempt: int, environment: dict[str, Any]) -> dict[str, str]:
    """Returns what identifies the run, and, under the number of the attempt, what may differ between attempts."""
    manifest = run_folder.manifest
    tags = {
        "identity": run_folder.id,
        "trainer.folder_id": manifest["folder_id"],
        "trainer.folder": str(run_folder.path.absolute()),
        "trainer.host": socket.gethostname(),
        "data": manifest["digests"]["data"][:12],
    }
    if manifest["parent"]:
        tags["trainer.parent"] = manifest["parent"]
    settings = to_plain(run)
    versions = {"trainer": environment["program"], **environment["packages"]}
    # One tag for each topic: MLflow shows all tags, and dozens would hide those above.
    attempt_tags = {
        "git": environment.get("git"),
        "machine": (
            f"{environment['host']}: {environment['device']}, {environment['threads']} threads, "
            f"{environment['platform']}, Python {environment['python']}"
        ),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "settings": " ".join(
            f"{name}={value}"
            for name, value in flatten({name: settings[name] for name in ATTEMPT_SETTINGS}).items()
            if value is not None
        ),
    }
    return tags | {f"attempt.{attempt}.{name}": value for name, value in attempt_tags.items() if value}


def describe_run(run: Run, folder: Path, counts: str) -> str:
    """Returns the Markdown text at the top of the run's page."""
    source = f" from `{run.dataset.path}`" if run.dataset.path else ""
    return (
        f"{RESULT}\n\n"
        f"**{option_name(run.method)}** on `{run.model.path}` with **{option_name(run.dataset)}** data{source}: "
        f"{counts}.\n\n"
        "Judge by **val/loss** (held-out samples with fixed noise and times; lower is better; comparable between runs) "
        "and **val/psnr** (generated images against targets, in dB; higher is better). "
        "*Images and curves* above opens the samples of the last step, with a slider for the step; a click on an image "
        "enlarges it. If *GenAI* is selected at the top left, as MLflow does when a run is opened from its list, click "
        "*Model training* once; the browser remembers it.\n\n"
        f"Folder: `{folder.absolute()}`"
    )
