"""Runs the members of a sweep and records how they end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import command_line
from trainer.config.request import requested_run
from trainer.core import documents, files
from trainer.core.console import print_line
from trainer.core.errors import Interrupted, TrainerError
from trainer.core.lock import Lock
from trainer.sweep.executors import Executor
from trainer.sweep.members import (
    Member,
    State,
    WarningReader,
    failure_reason,
    member_environment,
    set_varied,
    varied_values,
)
from trainer.sweep.summary import print_summary, summarize
from trainer.tracking import Tracking
from trainer.tracking.journal import Journal
from trainer.tracking.tracker import Tracker
from trainer.training.run_folder import RunSummary, find_run_folder, finished_folder
from trainer.training.tracked_run import shorten_overrides

IGNORED_IN_ID = ("out", "name", "tracking", "hardware", "log", "save", "cache", "hydra")
"""Settings that may change when a sweep is continued."""
POLL_SECONDS = 0.05


class MembersFailedError(TrainerError):
    """Some members of a sweep failed. All others have been run."""


def sweep_id(overrides: Sequence[str], sweeper: object) -> str:
    """Returns 12 hex digits that identify a sweep by its overrides and the settings of the sweeper.

    Settings that affect only where or how fast the sweep runs have no influence.
    """
    relevant = sorted(
        text.lstrip("+")
        for text in overrides
        if text.lstrip("+~").partition("=")[0].partition(".")[0] not in IGNORED_IN_ID
    )
    return hashlib.sha256(json.dumps([relevant, sweeper], sort_keys=True, default=str).encode()).hexdigest()[:12]


@dataclass(slots=True)
class Running:
    """A member that runs."""

    handle: Any
    """What the executor knows about it."""
    member: Member
    warnings: WarningReader


class Sweep:
    """A sweep, whose members are processes that an executor runs.

    Args:
        folder: Folder of the sweep. Its name is the ID of the sweep.
        out: Output folder of the runs.
        tracking: Settings of the tracker, which shows the runs under one parent run.
        executor: Runs the members.
        flags: Command line flags before the overrides of each member.
    """

    def __init__(self, folder: Path, out: Path, tracking: Tracking, executor: Executor[Any], flags: Sequence[str] = ()):
        self.folder, self.out, self.tracking, self.executor, self.flags = folder, out, tracking, executor, list(flags)
        self.members: list[Member] = []
        self._folder_id = ""
        self._running: dict[int, Running] = {}
        """Running members by number."""
        self._signal = 0
        self._parent_run: str | None = None

    def run(self, overrides: Sequence[Sequence[str]], first: int = 0) -> list[Member]:
        """Runs one member for each list of overrides and returns these members. A member that fails stops no other.

        `first` is the number of members in earlier batches of the same sweep. Adaptive sweepers run several batches.

        Raises errors.Interrupted after SIGINT or SIGTERM, when the running members have saved, and errors.LockedError
        if another process runs the same sweep.
        """
        with ExitStack() as stack:
            files.check_plain(self.folder)
            stack.enter_context(Lock(self.folder / "lock"))
            stack.enter_context(self._handle_signals())
            new = [Member(first + i, list(texts)) for i, texts in enumerate(overrides, 1)]
            if (finished := self._finished_members(new, first)) is not None:
                self.members = finished
                print_line(
                    f"sweep {self.folder.name} is finished ({_count(finished)}); nothing to do. Its data were not read "
                    "again."
                )
                print_summary(self.folder, finished, self.tracking, self.out)
                return finished[first:]
            self._load(new, first)
            print_line(f"sweep {self.folder.name}: {_count(new)}, {self.executor.slots} at a time, in {self.folder}")
            if not any(member.varied for member in self.members):
                print_line("no setting has several values, such as optimizer.lr=1e-4,1e-3, so this is a single run")
            # The exception tells the tracker that the sweep has failed. The caller looks at the members instead.
            stack.enter_context(contextlib.suppress(MembersFailedError))
            journal = stack.enter_context(Journal(self.folder))
            tracker = stack.enter_context(self._open_tracker(journal))
            journal.log_event("sweep", members=[member.title for member in new])
            self._parent_run = self._wait_for_run_id(tracker)
            self._run_members(deque(new))
            has_arrived = summarize(self.folder, self.members, self.tracking, self.out, tracker, journal)
            self._save(complete=has_arrived and all(member.status == State.FINISHED for member in self.members))
            if self._signal:
                raise Interrupted(self._signal)
            if any(member.status == State.FAILED for member in new):
                raise MembersFailedError(self.verdict())
        return new

    def verdict(self) -> str:
        """Returns one line on how all members so far have ended."""
        counts = Counter(member.status for member in self.members)
        states = (State.FINISHED, State.FAILED, State.STOPPED, State.WAITING)
        text = ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
        return (
            f"Sweep {self.folder.name}: {text}; {self.folder / 'ranking.md'}. The same command runs the members that "
            "are not finished."
        )

    # Running members

    def _run_members(self, waiting: deque[Member]) -> None:
        try:
            self._start_and_poll(waiting)
        except BaseException:
            # For example, the disk is full. The members save before this process ends and nobody watches them.
            for running in self._running.values():
                self.executor.stop(running.handle, signal.SIGTERM)
            while any(self.executor.poll(running.handle) is None for running in self._running.values()):
                time.sleep(POLL_SECONDS)
            raise

    def _start_and_poll(self, waiting: deque[Member]) -> None:
        forwarded = False
        while self._running or (waiting and not self._signal):
            for _ in range(len(waiting)):
                if not self._signal and len(self._running) < self.executor.slots:
                    member = waiting.popleft()
                    if not self._start(member):
                        waiting.append(member)
            if self._signal and not forwarded:
                # Not in the signal handler, which would miss a member that is just being started.
                forwarded = True
                print_line(
                    f"stopping: waiting for {len(self._running)} running member(s) to save; a second signal ends them "
                    "at once"
                )
                for running in self._running.values():
                    self.executor.stop(running.handle, self._signal)
            for running in list(self._running.values()):
                code = self.executor.poll(running.handle)
                for text in running.warnings.read():
                    self._print(running.member, f"warning: {text}")
                if code is not None:
                    del self._running[running.member.number]
                    self._record_end(running.member, code)
            time.sleep(POLL_SECONDS)

    def _start(self, member: Member) -> bool:
        """Starts a member. Returns False if it still runs because an earlier process of the sweep was killed."""
        log, report = self.folder / f"{member.number}.log", self._report_file(member)
        # Varied settings first: the title of a run lists its overrides in this order, and trackers cut it off.
        overrides = sorted(member.overrides, key=lambda text: text.lstrip("+").partition("=")[0] not in member.varied)
        command = [sys.executable, "-m", "trainer", *self.flags, *overrides, "hydra.mode=RUN"]
        report.unlink(missing_ok=True)
        handle = self.executor.start(command, member_environment(report, self._parent_run), log)
        if handle is None:
            if not member.log:
                self._print(member, f"waiting for an earlier process of this member, which still writes to {log}")
            member.log = str(log)
            return False
        member.status, member.log = State.RUNNING, str(log)
        self._running[member.number] = Running(handle, member, WarningReader(report))
        self._print(member, f"started, log {log}")
        self._save()
        return True

    def _record_end(self, member: Member, code: int) -> None:
        member.code = code
        stopped = code in (130, 143) or (self._signal and code in (128 + self._signal, -self._signal))
        member.status = State.FINISHED if code == 0 else State.STOPPED if stopped else State.FAILED
        member.reason = "" if code == 0 else failure_reason(Path(member.log), code)
        with contextlib.suppress(TrainerError):  # The member ended before it had a run folder or a loss.
            member.folder = documents.read_json(self._report_file(member))["folder"]
            self._report_file(member).unlink()
            summary = RunSummary.read(Path(member.folder))
            member.best_loss, member.last_loss = summary.best_loss, summary.last_loss
            member.psnr, member.minutes = summary.psnr, round(summary.seconds / 60, 1)
        loss = f", held-out loss {member.best_loss:.4f}" if member.best_loss is not None else ""
        reason = f": {member.reason}" if member.reason else ""
        self._print(member, f"{member.status}{loss}{reason}")
        self._save()

    def _report_file(self, member: Member) -> Path:
        return self.folder / f"{member.number}.json"

    def _print(self, member: Member, text: str) -> None:
        print_line(f"[{member.number}/{len(self.members)}] {member.title}: {text}")

    # The record of the sweep, and the tracker

    def _load(self, new: list[Member], first: int) -> None:
        """Reads the members of earlier batches, adds the new ones and writes `sweep.json`."""
        record = self._read_record()
        self.members = [Member.from_json(fields) for fields in record.get("members", [])[:first]] + new
        self._folder_id = record.get("folder_id") or uuid.uuid4().hex
        set_varied(self.members)
        self._save()

    def _finished_members(self, new: list[Member], first: int) -> list[Member] | None:
        """Returns the members of earlier batches and the `new` ones, as recorded, if nothing about them is left to do.

        None if one of them would train, or if the tracker does not have everything.
        """
        record = self._read_record()
        if not record.get("complete") or not self.tracking.is_complete(self.folder, self.out):
            return None
        members = [Member.from_json(fields) for fields in record["members"][: first + len(new)]]
        if len(members) != first + len(new):
            return None
        for member, typed in zip(members[first:], new, strict=True):
            try:
                # The same overrides may mean other settings if a yaml file has changed.
                arguments = [*self.flags, *typed.overrides, "hydra.mode=RUN"]
                request = requested_run(command_line.parse(arguments), find_run_folder)
                folder = finished_folder(request.run) if request else None
            except TrainerError:
                return None
            if folder is None or member.folder is None or folder.resolve() != Path(member.folder).resolve():
                return None
            if not self.tracking.is_complete(folder, self.out):
                return None
        return members

    def _read_record(self) -> dict[str, Any]:
        try:
            path = self.folder / "sweep.json"
            record = documents.expect(documents.read_json(path), dict, f"{path}")
            documents.entry(record, "members", list[dict], f"{path}")
            documents.expect(record.get("folder_id"), str | None, f"{path}: folder_id")
        except TrainerError:
            return {}
        return record

    def _save(self, complete: bool = False) -> None:
        """Writes `sweep.json`. `complete`: all members are finished, and the tracker has everything."""
        members = [asdict(member) for member in self.members]
        record = {"id": self.folder.name, "folder_id": self._folder_id, "complete": complete, "members": members}
        files.write_json(self.folder / "sweep.json", record)

    def _open_tracker(self, journal: Journal) -> Tracker:
        varied = [f"{key}={','.join(values)}" for key, values in varied_values(self.members).items()]
        return self.tracking.open(
            journal,
            self.out,
            name=f"sweep {shorten_overrides(varied)[:230]} [{self.folder.name[:6]}]",
            params={},
            tags={
                "trainer.sweep": self.folder.name,
                "trainer.folder_id": self._folder_id,
                "trainer.folder": str(self.folder.absolute()),
                "trainer.host": socket.gethostname(),
            },
            description=f"**Sweep** of {len(self.members)} runs, in progress. Folder: `{self.folder.absolute()}`",
        )

    def _wait_for_run_id(self, tracker: Tracker) -> str | None:
        """Returns the tracker's ID of the sweep; None if the tracker does not answer.

        The tracker then nests the members at the end of the sweep, if it answers by then.
        """
        while not tracker.flush(0.2) and not tracker.errors and not self._signal:
            pass
        return tracker.run_id

    # Signals

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        """Leaves the first SIGINT or SIGTERM to `_run_members`. A second one kills all members and this process."""

        def handle(number: int, frame: object) -> None:
            if not self._signal:
                self._signal = number
                return
            for running in self._running.values():
                self.executor.stop(running.handle, signal.SIGKILL)
            os._exit(128 + number)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _count(members: Sequence[Member]) -> str:
    return f"{len(members)} member{'' if len(members) == 1 else 's'}"
