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
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    JournalReader,
    Member,
    State,
    failure_reason,
    member_environment,
)
from trainer.sweep.plan import Plan, waiting
from trainer.sweep.record import SweepRecord
from trainer.sweep.summary import print_summary, summarize
from trainer.tracking import Tracking
from trainer.tracking.journal import METRICS, Journal
from trainer.tracking.tracker import Tracker
from trainer.training.run_folder import RunSummary, find_run_folder, finished_folder
from trainer.training.tracked_run import shorten_overrides

IGNORED_IN_ID = ("out", "name", "tracking", "hardware", "log", "alerts", "save", "cache", "hydra")
"""Settings that may change when a sweep is continued."""
POLL_SECONDS = 0.05
HELD_OUT_LOSS = "val/loss"


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
    journal: JournalReader
    pruned_at: int = 0
    """Step at which the plan has ended it early; 0 if it has not."""


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
        self._record = SweepRecord()
        self._running: dict[int, Running] = {}
        """Running members by number."""
        self._signal = 0
        self._parent_run: str | None = None
        self._total = 0

    def run(self, plan: Plan) -> list[Member]:
        """Runs the members of a plan and returns all members of the sweep. A member that fails stops no other.

        Raises errors.Interrupted after SIGINT or SIGTERM, when the running members have saved, and errors.LockedError
        if another process runs the same sweep.
        """
        with ExitStack() as stack:
            files.check_plain(self.folder)
            stack.enter_context(Lock(self.folder / "lock"))
            stack.enter_context(self._handle_signals())
            self._record = SweepRecord.read(self.folder)
            self.members = plan.start(self._record.members, self._record.folder_id)
            plan.set_varied(self.members)
            self._total = plan.total
            if self._is_finished(plan):
                self.members = self._record.members[: len(self.members)]
                print_line(
                    f"sweep {self.folder.name} is finished ({_count(self.members)}); nothing to do. Its data were not "
                    "read again."
                )
                print_summary(self.folder, self.members, plan, self.tracking, self.out)
                return self.members
            self._save()
            new = waiting(self.members)
            slots = self.executor.slots
            print_line(f"sweep {self.folder.name}: {plan.description}, {slots} at a time, in {self.folder}")
            if plan.is_exhausted and not any(member.varied for member in self.members):
                print_line("no setting has several values, such as optimizer.lr=1e-4,1e-3, so this is a single run")
            # The exception tells the tracker that the sweep has failed. The caller looks at the members instead.
            stack.enter_context(contextlib.suppress(MembersFailedError))
            journal = stack.enter_context(Journal(self.folder))
            tracker = stack.enter_context(self._open_tracker(journal, plan))
            journal.log_event("sweep", members=[member.title for member in new])
            self._parent_run = self._wait_for_run_id(tracker)
            self._run_members(plan, deque(new))
            has_arrived = summarize(self.folder, self.members, plan, self.tracking, self.out, tracker, journal)
            self._save(complete=has_arrived and all(map(plan.is_over, self.members)))
            if self._signal:
                raise Interrupted(self._signal)
            if not all(map(plan.is_over, self.members)):
                raise MembersFailedError(self.verdict())
        return self.members

    def verdict(self) -> str:
        """Returns one line on how all members so far have ended."""
        counts = Counter(member.status for member in self.members)
        states = (State.FINISHED, State.PRUNED, State.FAILED, State.STOPPED, State.WAITING)
        text = ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
        return (
            f"Sweep {self.folder.name}: {text}; {self.folder / 'ranking.md'}. The same command runs the members that "
            "are not finished."
        )

    # Running members

    def _run_members(self, plan: Plan, queue: deque[Member]) -> None:
        try:
            self._start_and_poll(plan, queue)
        except BaseException:
            # For example, the disk is full. The members save before this process ends and nobody watches them.
            for running in self._running.values():
                self.executor.stop(running.handle, signal.SIGTERM)
            while any(self.executor.poll(running.handle) is None for running in self._running.values()):
                time.sleep(POLL_SECONDS)
            raise

    def _start_and_poll(self, plan: Plan, queue: deque[Member]) -> None:
        forwarded = False
        while True:
            if not self._signal:
                with self.executor.batch():
                    self._fill_slots(plan, queue)
            if not self._running and (self._signal or not queue):
                return
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
                self._follow(plan, running)
                if code is not None:
                    del self._running[running.member.number]
                    self._record_end(running, code)
                    plan.record_end(running.member, self.members)
            time.sleep(POLL_SECONDS)

    def _fill_slots(self, plan: Plan, queue: deque[Member]) -> None:
        """Starts waiting members, and then further ones of the plan, while slots are free."""
        for _ in range(len(queue)):
            if len(self._running) < self.executor.slots:
                member = queue.popleft()
                if not self._start(member):
                    queue.append(member)
        while len(self._running) < self.executor.slots and (new := plan.next_member(self.members)) is not None:
            self.members.append(new)
            plan.set_varied(self.members)
            self._save()
            if not self._start(new):
                queue.append(new)

    def _follow(self, plan: Plan, running: Running) -> None:
        """Prints the new warnings of a running member, and ends it early if the plan says so."""
        for record in running.journal.read():
            if record["kind"] == "warning":
                self._print(running.member, f"warning: {' '.join(str(record.get('text')).split())}")
            elif record["kind"] == METRICS and HELD_OUT_LOSS in record["values"] and not running.pruned_at:
                step, loss = record["step"], record["values"][HELD_OUT_LOSS]
                if plan.should_prune(running.member, step, loss):
                    running.pruned_at = step
                    text = f"pruned at step {step}, held-out loss {loss:.4f}; waiting for it to save"
                    self._print(running.member, text)
                    self.executor.stop(running.handle, signal.SIGTERM)

    def _start(self, member: Member) -> bool:
        """Starts a member. Returns False if it still runs because an earlier process of the sweep was killed."""
        log, report = self.folder / f"{member.number}.log", self._report_file(member)
        # Varied settings first: the title of a run lists its overrides in this order, and trackers cut it off.
        overrides = sorted(member.overrides, key=lambda text: text.lstrip("+").partition("=")[0] not in member.varied)
        command = [sys.executable, "-m", "trainer", *self.flags, *overrides, "hydra.mode=RUN"]
        handle = self.executor.adopt(log)
        verb = "still runs" if handle else "started"
        if handle is None:
            report.unlink(missing_ok=True)
            handle = self.executor.start(command, member_environment(report, self._parent_run), log)
        if handle is None:
            if not member.log:
                self._print(member, f"waiting for an earlier process of this member, which still writes to {log}")
            member.log = str(log)
            return False
        member.status, member.log = State.RUNNING, str(log)
        self._running[member.number] = Running(handle, member, JournalReader(report))
        self._print(member, f"{verb}, log {log}")
        self._save()
        return True

    def _record_end(self, running: Running, code: int) -> None:
        member = running.member
        member.code = code
        stopped = code in (130, 143) or (self._signal and code in (128 + self._signal, -self._signal))
        member.status = State.FINISHED if code == 0 else State.STOPPED if stopped else State.FAILED
        member.reason = "" if code == 0 else failure_reason(Path(member.log), code)
        if running.pruned_at and stopped and not self._signal:
            member.status, member.reason = State.PRUNED, f"at step {running.pruned_at}"
        with contextlib.suppress(TrainerError):  # The member ended before it had a run folder or a loss.
            member.folder = documents.read_json(self._report_file(member))["folder"]
            self._report_file(member).unlink()
            summary = RunSummary.read(Path(member.folder))
            member.best_loss, member.last_loss = summary.best_loss, summary.last_loss
            member.psnr, member.memory = summary.psnr, summary.memory
            member.minutes = round(summary.seconds / 60, 1)
        loss = f", held-out loss {member.best_loss:.4f}" if member.best_loss is not None else ""
        reason = f": {member.reason}" if member.reason and member.status != State.PRUNED else ""
        self._print(member, f"{member.ending}{loss}{reason}")
        self._save()

    def _report_file(self, member: Member) -> Path:
        return self.folder / f"{member.number}.json"

    def _print(self, member: Member, text: str) -> None:
        print_line(f"[{member.number}/{self._total}] {member.title}: {text}")

    # The record of the sweep, and the tracker

    def _is_finished(self, plan: Plan) -> bool:
        """Returns whether nothing about the members of a plan is left to do: none of them would train.

        Their trackers have everything.
        """
        # A sweep in batches knows only the members of the first ones so far.
        recorded = self._record.members[: len(self.members)]
        if not (self._record.complete and plan.is_exhausted and len(recorded) == len(self.members)):
            return False
        return self.tracking.is_complete(self.folder, self.out) and all(map(self._has_ended, recorded, self.members))

    def _has_ended(self, recorded: Member, member: Member) -> bool:
        """Returns whether a member with the overrides of `member` is the one in the record, which has ended well."""
        try:
            # The same overrides may mean other settings if a yaml file has changed.
            request = requested_run(
                command_line.parse([*self.flags, *member.overrides, "hydra.mode=RUN"]), find_run_folder
            )
            folder = finished_folder(request.run) if request else None
        except TrainerError:
            return False
        if recorded.status != State.FINISHED:
            return True
        if folder is None or recorded.folder is None or folder.resolve() != Path(recorded.folder).resolve():
            return False
        return self.tracking.is_complete(folder, self.out)

    def _save(self, complete: bool = False) -> None:
        """Writes `sweep.json`. `complete`: nothing is left to do about the members, and the tracker has everything."""
        self._record.write(self.folder, self.members, complete)

    def _open_tracker(self, journal: Journal, plan: Plan) -> Tracker:
        return self.tracking.open(
            journal,
            self.out,
            name=f"sweep {shorten_overrides(plan.searched)[:230]} [{self.folder.name[:6]}]",
            params={},
            tags={
                "trainer.sweep": self.folder.name,
                "trainer.folder_id": self._record.folder_id,
                "trainer.folder": str(self.folder.absolute()),
                "trainer.host": socket.gethostname(),
            },
            description=f"**Sweep** of {plan.description}, in progress. Folder: `{self.folder.absolute()}`",
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
