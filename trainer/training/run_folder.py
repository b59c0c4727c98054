"""The folder of a run: found or created, locked, and checked against what the run started with."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trainer.config.identity import differences, identity_settings, run_id
from trainer.config.schema import Run
from trainer.core import documents, files
from trainer.core.console import timestamp
from trainer.core.errors import UsageError
from trainer.core.lock import Lock
from trainer.core.version import __version__

MANIFEST = "run.json"
SUMMARY = "summary.json"


@dataclass(slots=True)
class RunFolder:
    """The folder of a run, locked by this process."""

    path: Path
    id: str
    manifest: dict[str, Any]
    """Contents of `run.json`: identity, settings and digests that the run started with."""
    parent: Path | None
    """Folder of the run whose last checkpoint this run starts from, if any."""
    finished: bool


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How the last attempt at a run ended: what `summary.json` says to this program."""

    status: str
    """"finished" or "stopped"."""
    steps: int
    """Number of steps trained so far."""
    seconds: float
    """Duration of all attempts."""
    best_loss: float | None
    """Lowest held-out loss; None if no samples are held out."""
    last_loss: float | None
    psnr: float | None
    """Mean PSNR of the last generated images against their targets, in dB; None if there are no targets."""
    memory: float | None
    """Memory in GiB: the peak on the GPU, or what the process holds at the end."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the summary of the run in `folder`.

        Raises errors.StorageError if there is none and errors.DataError if it is damaged.
        """
        where = str(folder / SUMMARY)
        summary = documents.expect(documents.read_json(folder / SUMMARY), dict, where)
        final = documents.entry(summary, "final", dict, where)
        return cls(
            status=documents.entry(summary, "status", str, where),
            steps=documents.entry(summary, "steps", int, where),
            seconds=documents.entry(summary, "seconds", float, where),
            best_loss=_optional_number(summary, "best_val_loss", where),
            last_loss=_optional_number(summary, "last_val_loss", where),
            psnr=_optional_number(final, "val/psnr", where),
            memory=_optional_number(final, "system/device_memory_peak_gib", where)
            or _optional_number(final, "system/memory_gib", where),
        )


def _optional_number(mapping: dict[str, Any], name: str, where: str) -> float | None:
    """Returns a number that may be missing, or not finite. Raises errors.DataError for any other value."""
    value = mapping.get(name)
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return documents.expect(value, float | None, f"{where}: {name}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the content of `run.json`. Raises errors.StorageError, and errors.DataError if it is damaged."""
    where = str(folder / MANIFEST)
    manifest = documents.expect(documents.read_json(folder / MANIFEST), dict, where)
    for name, kind in (("settings", dict), ("digests", dict), ("folder_id", str)):
        documents.entry(manifest, name, kind, where)
    documents.expect(manifest.get("parent"), str | None, f"{where}: parent")
    for name in ("data", "program"):
        documents.entry(manifest["digests"], name, str, f"{where}: digests")
    return manifest


def finished_folder(run: Run) -> Path | None:
    """Returns the folder of a run that this version of the program has finished; None if training has work to do.

    Reads neither data nor weights, which may have changed since. Raises errors.DataError if a file is damaged.
    """
    if run.fresh or run.resume is not None:
        return None
    folder = _latest_folder(Path(run.out), run_id(run), fresh=False)
    if not (folder / MANIFEST).exists() or not _is_finished(folder):
        return None
    manifest = read_manifest(folder)
    return folder if manifest["digests"]["program"] == __version__ else None


@contextmanager
def acquire_run_folder(run: Run, digests: dict[str, Any]) -> Iterator[RunFolder]:
    """Finds or creates the folder of a run and locks it.

    Raises errors.UsageError if the data, weights or program version are not those that the run started with, and
    errors.LockedError if another process works on the run.
    """
    settings, parent = identity_settings(run), None
    if run.resume is not None:
        folder, parent = _resumed_folder(run, settings)
        id = folder.name
    else:
        id = run_id(run)
        folder = _own_folder(Path(run.out), id, run.fresh, digests | {"program": __version__})
    if not (folder / MANIFEST).exists():
        with files.storage_errors("make the run folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
    files.check_plain(folder)
    with Lock(folder / "lock"):
        digests = digests | {"program": __version__}
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            _check_digests(folder, manifest["digests"], digests)
        else:
            manifest = {
                "id": id,
                "folder_id": uuid.uuid4().hex,
                "settings": settings,
                "digests": digests,
                "parent": str(parent) if parent else None,
                "created": timestamp(),
            }
            files.write_json(folder / MANIFEST, manifest)
        finished = _is_finished(folder)
        if not finished:
            files.remove_temporary(folder)
        yield RunFolder(folder, id, manifest, parent, finished)


def _is_finished(folder: Path) -> bool:
    return (folder / SUMMARY).exists() and RunSummary.read(folder).status == "finished"


def _check_digests(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if changes := differences(old, new):
        raise UsageError(
            f"{folder} started with different data, weights or program version "
            f"({'; '.join(_shorten_digests(change) for change in changes)}). "
            "Continuing would mix two runs: type fresh=true to train with what is there now, in a new folder, or "
            "restore what changed"
        )


def _own_folder(out: Path, id: str, fresh: bool, digests: dict[str, Any]) -> Path:
    """Returns the last folder of the id that started with these digests, else the last one; with `fresh` a new one."""
    latest = _latest_folder(out, id, fresh)
    if fresh:
        return latest
    for number in sorted(_folder_numbers(out, id), reverse=True):
        folder = _numbered_folder(out, id, number)
        if (folder / MANIFEST).exists() and read_manifest(folder)["digests"] == digests:
            return folder
    return latest


def _latest_folder(out: Path, id: str, fresh: bool) -> Path:
    """Returns the last existing folder of `<id>`, `<id>-2`, `<id>-3`, ...; with `fresh` the next one."""
    numbers = _folder_numbers(out, id)
    return _numbered_folder(out, id, max(numbers, default=0) + 1 if fresh else max(numbers, default=1))


def _folder_numbers(out: Path, id: str) -> list[int]:
    """Returns the numbers of the existing folders of an id; the one without a number is 1."""
    numbers = [1] if (out / id / MANIFEST).exists() else []
    names = [path.name for path in out.glob(f"{id}-*")]
    return numbers + [int(name.rpartition("-")[2]) for name in names if re.fullmatch(rf"{id}-\d+", name)]


def _numbered_folder(out: Path, id: str, number: int) -> Path:
    return out / (id if number == 1 else f"{id}-{number}")


def _resumed_folder(run: Run, settings: dict[str, Any]) -> tuple[Path, Path | None]:
    """Returns the folder of a run with `resume`, and its parent.

    The folder is the one that `resume` names. If `steps` is larger than in that run, it is a new one, and that run is
    the parent.
    """
    assert run.resume is not None
    folder = find_run_folder(run.resume, run.out)
    old_settings = read_manifest(folder)["settings"]
    changes = differences(old_settings, settings)
    only_steps_changed = [change.partition(":")[0] for change in changes] == ["steps"]
    if only_steps_changed and (run.steps or 0) > (old_settings["steps"] or 0) > 0:
        longer_id = hashlib.sha256(json.dumps([folder.name, settings], sort_keys=True).encode()).hexdigest()[:12]
        return _latest_folder(Path(run.out), longer_id, fresh=False), folder
    if changes:
        raise UsageError(
            f"resume={run.resume} continues exactly the run in {folder}, whose settings differ: "
            f"{'; '.join(changes)}. Type the settings of that run (only steps may be larger), or leave out resume to "
            "start another run"
        )
    return folder, None


def find_run_folder(name: str, out: str) -> Path:
    """Returns the run folder that an id or a path names.

    Raises errors.UsageError if there is none, errors.StorageError if it contains links.
    """
    for folder in (Path(name).expanduser(), Path(out) / name):
        # Path.is_file raises an error for a name that is too long.
        if os.path.isfile(folder / MANIFEST):
            files.check_plain(folder)
            return folder
    runs = sorted(path.parent.name for path in Path(out).glob(f"*/{MANIFEST}"))
    raise UsageError(
        f"neither {name} nor {Path(out) / name} is a run folder; runs in {out}/: {', '.join(runs[-8:]) or 'none'}"
    )


def _shorten_digests(text: str) -> str:
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{54}\b", r"\1...", text)
