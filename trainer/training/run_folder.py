"""The run's folder: found or made, locked, and refused where what lies in it began otherwise."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.config.identity import differences, identity_settings, run_id
from trainer.config.schema import Run
from trainer.core import files
from trainer.core.console import timestamp
from trainer.core.errors import UsageError
from trainer.core.lock import Lock

MANIFEST, SUMMARY, CHECKPOINTS = "run.json", "summary.json", "checkpoints"


@dataclass(slots=True)
class RunFolder:
    """The run's folder, held by this process alone, and what was found there."""

    folder: Path
    id: str
    manifest: dict[str, Any]
    parent: Path | None
    finished: bool


def acquire(run: Run, digests: dict[str, Any], stack: ExitStack) -> RunFolder:
    """Find or make the folder of this run, lock it, and refuse to go on with other data, weights or program than it began with."""
    decisive, parent = identity_settings(run), None
    if run.resume is not None:
        folder, decisive, parent = _resumed(run, decisive)
        id = folder.name
    else:
        id = run_id(run)
        folder = _newest(Path(run.out), id, run.fresh)
    if not (folder / MANIFEST).exists():
        with files.storage_errors("make the run folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(Lock(folder / "lock"))
    path = folder / MANIFEST
    digests = digests | {"program": __version__}
    if path.exists():
        manifest = files.read_json(path)
        changes = differences(manifest["digests"], digests)
        if changes:
            raise UsageError(
                f"{folder} began with other data, weights or program than there are now ({'; '.join(_short(change) for change in changes)}). "
                "Continuing would be a mixture of two runs: type fresh=true for a new one, or restore what changed"
            )
    else:
        manifest = {
            "id": id,
            "folder_id": uuid.uuid4().hex,
            "settings": decisive,
            "digests": digests,
            "parent": str(parent) if parent else None,
            "created": timestamp(),
        }
        files.write_json(path, manifest)
    finished = (folder / SUMMARY).exists() and files.read_json(folder / SUMMARY).get("status") == "finished"
    if not finished:
        files.remove_temporary(folder)
    return RunFolder(folder, id, manifest, parent, finished)


def _newest(out: Path, id: str, fresh: bool) -> Path:
    """`<id>`, or the last of `<id>-2`, `<id>-3` ... that is there; with `fresh` the next that is not."""
    numbers = [1] if (out / id / MANIFEST).exists() else []
    numbers += [
        int(path.name.rpartition("-")[2]) for path in out.glob(f"{id}-*") if re.fullmatch(rf"{id}-\d+", path.name)
    ]
    number = max(numbers, default=0) + 1 if fresh else max(numbers, default=1)
    return out / (id if number == 1 else f"{id}-{number}")


def _resumed(run: Run, decisive: dict[str, Any]) -> tuple[Path, dict[str, Any], Path | None]:
    """The folder that `resume` names; with more steps a new one, whose parent it is."""
    folder = find(run.resume, run.out)
    begun = files.read_json(folder / MANIFEST)["settings"]
    changes = differences(begun, decisive)
    if [change.partition(":")[0] for change in changes] == ["steps"] and (run.steps or 0) > (begun["steps"] or 0) > 0:
        longer = hashlib.sha256(json.dumps([folder.name, decisive], sort_keys=True).encode()).hexdigest()[:12]
        return _newest(Path(run.out), longer, fresh=False), decisive, folder
    if changes:
        raise UsageError(
            f"resume={run.resume} continues exactly the run in {folder}, and these settings are not its own: {'; '.join(changes)}. "
            "Type the settings it began with (only steps may be larger), or leave resume out to start a run of its own"
        )
    return folder, decisive, None


def find(name: str, out: str) -> Path:
    """The run folder that an id or a path names."""
    for folder in (Path(name).expanduser(), Path(out) / name):
        if (folder / MANIFEST).is_file():
            return folder
    there = sorted(path.parent.name for path in Path(out).glob(f"*/{MANIFEST}"))
    raise UsageError(
        f"{name} is no run folder, nor is {Path(out) / name}; runs in {out}/: {', '.join(there[-8:]) or 'none'}"
    )


def _short(change: str) -> str:
    """Digests by their first digits."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{54}\b", r"\1...", change)
