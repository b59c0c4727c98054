"""The members of a sweep: their states, and how a member communicates with the sweep that started it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from trainer.core import documents, files
from trainer.core.errors import DataError, TrainerError
from trainer.tracking import journal as journal_file

PARENT_RUN_VARIABLE = "TRAINER_PARENT_RUN"
"""Environment variable with the tracker's ID of the sweep."""
REPORT_VARIABLE = "TRAINER_RESULT"
"""Environment variable with the path of the JSON file in which a member reports its run folder."""

LIFELINE_VARIABLE = "TRAINER_LIFELINE"
"""Environment variable with the descriptor of a pipe that is closed when the sweep ends, however it ends."""


class State(StrEnum):
    """State of a member, as stored in `sweep.json`."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    PRUNED = "pruned"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(slots=True)
class Member:
    """One run of a sweep. Its fields are stored in `sweep.json`."""

    number: int
    overrides: list[str]
    varied: dict[str, str] = field(default_factory=dict)
    """This member's values of the settings that differ between members."""
    status: State = State.WAITING
    code: int | None = None
    """Exit code, or -N if signal N killed the process."""
    reason: str = ""
    """Why the member did not finish."""
    log: str = ""
    """File with everything that the member printed."""
    folder: str | None = None
    """Run folder; None if the member ended before it had one."""
    best_loss: float | None = None
    last_loss: float | None = None
    psnr: float | None = None
    """In dB."""
    minutes: float | None = None
    """Duration of all attempts."""
    memory: float | None = None
    """Peak memory in GiB."""
    trial: int | None = None
    """Number of its trial in a search."""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Member:
        """Returns the member whose fields were read from `sweep.json`. Raises errors.DataError if these are damaged."""
        where = "sweep.json: members"
        kinds: dict[str, Any] = {
            "number": int,
            "overrides": list[str],
            "varied": dict[str, str],
            "status": str,
            "code": int | None,
            "reason": str,
            "log": str,
            "folder": str | None,
        }
        values = {name: documents.entry(fields, name, kind, where) for name, kind in kinds.items()}
        # Not in the records of earlier versions.
        values["trial"] = documents.expect(fields.get("trial"), int | None, f"{where}: trial")
        for name in ("best_loss", "last_loss", "psnr", "minutes", "memory"):
            # A loss may be NaN.
            if not isinstance(value := fields.get(name), float):
                value = documents.expect(value, float | None, f"{where}: {name}")
            values[name] = value
        if values["status"] not in [*State]:
            raise DataError(f"{where}: status is {values['status']!r:.40}. Restore the file, or move it away.")
        return cls(**values | {"status": State(values["status"])})

    @property
    def settings(self) -> dict[str, str]:
        """The overrides as key -> value."""
        return {key: value for key, _, value in (text.lstrip("+").partition("=") for text in self.overrides)}

    @property
    def command(self) -> list[str]:
        """The arguments that run this member alone."""
        # A named sweep asks for several members, and its file may hold settings that they share.
        is_named = any(text.startswith("sweep=") for text in self.overrides)
        return [*self.overrides, *(["hydra.mode=RUN"] if is_named else [])]

    @property
    def ending(self) -> str:
        """The state in words; of a pruned member also the step."""
        return f"{self.status} {self.reason}" if self.status == State.PRUNED else self.status

    @property
    def title(self) -> str:
        """The settings that distinguish the member from the others."""
        return " ".join(f"{key}={short_value(value)}" for key, value in self.varied.items()) or "defaults"


def short_value(text: str) -> str:
    """Returns a value for people to read: a number with more digits than a search needs is rounded."""
    if len(text) > 8 and re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", text):
        return f"{float(text):.4g}"
    return text


def set_varied(members: Sequence[Member], varied: Sequence[str] | None = None) -> None:
    """Sets `varied` of all members to their values of these settings; None: of those that differ between them."""
    settings = [member.settings for member in members]
    if varied is None:
        keys = dict.fromkeys(key for own in settings for key in own)
        varied = [key for key in keys if len({own.get(key) for own in settings}) > 1]
    for member, own in zip(members, settings, strict=True):
        member.varied = {key: own[key] for key in varied if key in own}


def varied_values(members: Sequence[Member]) -> dict[str, list[str]]:
    """Returns the values of each setting that differs between members."""
    values: dict[str, dict[str, None]] = {}
    for member in members:
        for key, value in member.varied.items():
            values.setdefault(key, {})[value] = None
    return {key: list(found) for key, found in values.items()}


def failure_reason(log: Path, code: int) -> str:
    """Returns why a member did not finish: the signal that killed it, or the last line of its log."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (as the kernel does when memory runs out)" if name == "SIGKILL" else "")
    try:
        lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    except OSError:
        lines = []
    return next((" ".join(line.split())[:500] for line in reversed(lines) if line.strip()), f"exit code {code}")


def member_environment(report: Path, parent_run: str | None) -> dict[str, str]:
    """Returns the environment variables of a member's process.

    The member writes its run folder to `report` and is shown under `parent_run` by the tracker.
    """
    environment = {**os.environ, REPORT_VARIABLE: str(report.absolute()), "PYTHONFAULTHANDLER": "1"}
    environment.pop(PARENT_RUN_VARIABLE, None)
    if parent_run:
        environment[PARENT_RUN_VARIABLE] = parent_run
    return environment


def parent_run_id() -> str | None:
    """Returns the tracker's ID of the sweep that this process is a member of, if any."""
    return os.environ.get(PARENT_RUN_VARIABLE) or None


def is_member() -> bool:
    """Returns whether a sweep has started this process."""
    return REPORT_VARIABLE in os.environ


def end_with_sweep() -> None:
    """Makes this process receive SIGTERM, so that it saves and exits, when the sweep that started it has died.

    Does nothing in a process that no sweep has started.
    """
    descriptor = os.environ.pop(LIFELINE_VARIABLE, "")
    if not descriptor.isdecimal():
        return

    def wait_for_end() -> None:
        with contextlib.suppress(OSError):
            os.set_inheritable(int(descriptor), False)
            # Nothing is ever written to the pipe. Reading returns when its other end is closed.
            if not os.read(int(descriptor), 1):
                os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_end, name="lifeline", daemon=True).start()


def report_folder(folder: Path) -> None:
    """Reports the run folder of this process, before it writes to it, to the sweep that started it, if any."""
    if path := os.environ.get(REPORT_VARIABLE):
        journal = folder / journal_file.FILE_NAME
        size = journal.stat().st_size if journal.exists() else 0
        files.write_json(Path(path), {"folder": str(folder), "journal_bytes": size})


class JournalReader:
    """Reads what a member writes to the journal of its run, after the member has reported its folder."""

    def __init__(self, report: Path):
        self._report = report
        self._journal: Path | None = None
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Returns the new records."""
        if self._journal is None:
            try:
                report = documents.read_json(self._report)
            except TrainerError:
                return []
            self._journal = Path(report["folder"]) / journal_file.FILE_NAME
            self._offset = report["journal_bytes"]
        records = []
        for offset, record in journal_file.read_records(self._journal, self._offset):
            self._offset = offset
            records.append(record)
        return records
