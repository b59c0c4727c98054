"""`tracking.json`: what a run folder remembers about its MLflow run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.core import documents, errors, files
from trainer.tracking import journal

FILE_NAME = "tracking.json"


def read_note(folder: Path) -> dict[str, Any]:
    """Returns the note in `folder`; empty if it is missing or damaged, since a tag also identifies the run in MLflow.

    Keys: `uri`, `experiment_id` and `run_id`; after the run has ended, MLflow's `status` and `sent`, the number of
    bytes of the journal that MLflow has received (None if some are missing).
    """
    where = str(folder / FILE_NAME)
    try:
        note = documents.expect(documents.read_json(folder / FILE_NAME), dict, where)
        for name in ("uri", "experiment_id", "run_id", "status"):
            documents.expect(note.get(name), str | None, f"{where}: {name}")
        sent = documents.expect(note.get("sent"), int | None, f"{where}: sent")
        if sent is not None and not 0 <= sent < 2**63:  # not a position in a file
            return {}
    except errors.TrainerError:
        return {}
    return note


def write_note(folder: Path, note: dict[str, Any]) -> None:
    """Writes the note; does nothing if the folder cannot be written."""
    with contextlib.suppress(errors.StorageError):
        files.write_json(folder / FILE_NAME, note)


def is_complete(folder: Path) -> bool:
    """Returns whether MLflow has all metrics and images of the run in `folder`, and the status of its last attempt."""
    sent = read_note(folder).get("sent")
    if sent is None:
        return False
    records = journal.read_records(folder / journal.FILE_NAME, sent)
    return not any(record["kind"] in (journal.METRICS, journal.IMAGE) for _, record in records)


def run_ids(folders: Sequence[Path], experiment_id: str | None) -> list[str]:
    """Returns the MLflow IDs of the runs in `folders` that belong to the experiment, without duplicates."""
    notes = [read_note(folder) for folder in folders]
    own = [note["run_id"] for note in notes if note.get("run_id") and note.get("experiment_id") == experiment_id]
    return list(dict.fromkeys(own))
