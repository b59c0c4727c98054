"""A sweep: every member a run of its own in a process of its own, all under one MLflow run, and a table of them ranked by held-out loss.

    <out>/sweeps/<id>/
      lock sweep.json               held while the sweep goes on; what is known of every member
      1.log 2.log ...               all that each member printed
      ranking.md ranking.csv heat_map.png samples.png

The unit is `python -m trainer <overrides>`, which continues what is unfinished and says so of what is finished: a sweep that was stopped goes
on by the same command, and no member can take another one along.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core import files
from trainer.core.console import print_line
from trainer.core.errors import Interrupted, TrainerError
from trainer.training.provenance import short

if TYPE_CHECKING:
    from trainer.tracking import Sink, Tracking
    from trainer.tracking.journal import Journal

PARENT = "TRAINER_PARENT_RUN"
"""Names the MLflow run that the runs of this process are shown under."""
RESULT = "TRAINER_RESULT"
"""Names the file in which a member says where its run lies."""
SILENT = ("out", "name", "tracking", "hardware", "log", "save", "cache", "hydra")
"""What may differ when the same sweep goes on."""
WAITING, RUNNING, FINISHED, STOPPED, FAILED = "waiting", "running", "finished", "stopped", "failed"


class Failed(TrainerError):
    """Some members of a sweep failed; the others are done."""


@dataclass(slots=True)
class Member:
    """One run of the sweep, and how far it is known. Losses, `psnr` (dB) and `minutes` (of all attempts) are None where there are none."""

    number: int
    overrides: list[str]
    varied: dict[str, str] = field(default_factory=dict)
    status: str = WAITING
    code: int | None = None
    reason: str = ""
    log: str = ""
    folder: str | None = None
    best_loss: float | None = None
    last_loss: float | None = None
    psnr: float | None = None
    minutes: float | None = None

    @property
    def settings(self) -> dict[str, str]:
        return {key: value for key, _, value in (text.lstrip("+").partition("=") for text in self.overrides)}

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return " ".join(f"{key}={value}" for key, value in self.varied.items()) or "defaults"


# What a member asks and tells


def parent() -> str | None:
    """The MLflow run under which this process's run belongs."""
    return os.environ.get(PARENT) or None


def tell(folder: Path) -> None:
    """Say to the sweep that started this process, if one did, in which folder the run lies."""
    if path := os.environ.get(RESULT):
        files.write_json(Path(path), {"folder": str(folder)})


# The sweep itself


def identity(overrides: Sequence[str], sweeper: dict[str, Any]) -> str:
    """Twelve hex digits that name the sweep: of what was typed and what the sweeper does with it, not of where it goes or how fast."""
    loud = sorted(
        text.lstrip("+") for text in overrides if text.lstrip("+~").partition("=")[0].partition(".")[0] not in SILENT
    )
    return hashlib.sha256(json.dumps([loud, sweeper], sort_keys=True, default=str).encode()).hexdigest()[:12]


class Sweep:
    """The members that a sweeper asks for, run `slots` at once, in `folder`, whose name is the sweep's id.

    `flags` stand before every member's overrides. Raises errors.LockedError while another process runs the same sweep.
    """

    def __init__(self, folder: Path, out: Path, tracking: Tracking, slots: int = 1, flags: Sequence[str] = ()):
        self.folder, self.out, self.tracking, self.slots, self.flags = folder, out, tracking, max(1, slots), list(flags)
        self.members: list[Member] = []
        self._running: dict[int, tuple[subprocess.Popen, Member]] = {}
        """By slot."""
        self._signal = 0
        self._parent: str | None = None

    def run(self, overrides: Sequence[Sequence[str]], first: int = 0) -> list[Member]:
        """Run one member for each list of overrides; the members, in that order. `first` counts those of earlier batches of the sweep.

        A failed member stops no other one. Raises errors.Interrupted after SIGINT or SIGTERM, when the running members have saved.
        """
        from trainer.tracking.journal import Journal

        with ExitStack() as stack:
            stack.enter_context(files.Lock(self.folder / "lock"))
            stack.enter_context(self._signals())
            note = self._read()
            mine = [Member(first + i, list(texts)) for i, texts in enumerate(overrides, 1)]
            self.members = [Member(**known) for known in note.get("members", [])[:first]] + mine
            self._note = {"id": self.folder.name, "folder_id": note.get("folder_id") or uuid.uuid4().hex}
            _vary(self.members)
            self._write()
            print_line(f"sweep {self.folder.name}: {len(mine)} members, {self.slots} at a time, in {self.folder}")
            # Its exception is for MLflow, which takes the status of the sweep from it.
            stack.enter_context(contextlib.suppress(Failed))
            journal = stack.enter_context(Journal(self.folder))
            sink = stack.enter_context(self._shown(journal))
            journal.event("sweep", members=[member.title for member in mine])
            self._parent = _run_of(sink, lambda: self._signal)
            self._work(deque(mine))
            self._sum_up(sink, journal)
            if self._signal:
                raise Interrupted(self._signal)
            if any(member.status == FAILED for member in mine):
                raise Failed(self.verdict())
        return mine

    def verdict(self) -> str:
        """One line on all members so far."""
        counts = Counter(member.status for member in self.members)
        text = ", ".join(
            f"{counts[status]} {status}" for status in (FINISHED, FAILED, STOPPED, WAITING) if counts[status]
        )
        return f"Sweep {self.folder.name}: {text}; {self.folder / 'ranking.md'}. The same command does what is not finished."

    # The members

    def _work(self, waiting: deque[Member]) -> None:
        told = False
        while self._running or (waiting and not self._signal):
            for slot in range(self.slots):
                if waiting and not self._signal and slot not in self._running:
                    self._start(waiting.popleft(), slot)
            if self._signal and not told:
                # Not from the handler: a member that is just being started would miss it.
                told = True
                print_line(
                    f"stopping: waiting for {len(self._running)} running member(s) to save; a second signal ends them at once"
                )
                for process, _ in self._running.values():
                    process.send_signal(self._signal)
            for slot, (process, member) in list(self._running.items()):
                if process.poll() is not None:
                    del self._running[slot]
                    self._ended(member, process.returncode)
            time.sleep(0.05)

    def _start(self, member: Member, slot: int) -> None:
        log, result = self.folder / f"{member.number}.log", self._result(member)
        result.unlink(missing_ok=True)
        member.status, member.log = RUNNING, str(log)
        environment = {**os.environ, RESULT: str(result.absolute()), "PYTHONFAULTHANDLER": "1", **self._share(slot)}
        environment.pop(PARENT, None)
        if self._parent:
            environment[PARENT] = self._parent
        # What varies first: a run is called by what was typed, and lists are narrow.
        overrides = sorted(member.overrides, key=lambda text: text.lstrip("+").partition("=")[0] not in member.varied)
        command = [sys.executable, "-m", "trainer", *self.flags, *overrides, "hydra.mode=RUN"]
        with files.storage("write", log), open(log, "wb") as output:
            # A session of its own: Ctrl-C in a terminal reaches it once, through us.
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running[slot] = (process, member)
        print_line(f"[{member.number}/{len(self.members)}] {member.title}: started, log {log}")
        self._write()

    def _share(self, slot: int) -> dict[str, str]:
        """The part of the machine that belongs to a slot: one GPU of several, its share of the cores."""
        if self.slots == 1:
            return {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = (
            visible.split(",")
            if visible
            else [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
        )
        share = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
        if "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.slots))
        return share

    def _result(self, member: Member) -> Path:
        return self.folder / f"{member.number}.json"

    def _ended(self, member: Member, code: int) -> None:
        member.code = code
        asked = self._signal and code in (128 + self._signal, -self._signal)
        member.status = FINISHED if code == 0 else STOPPED if asked or code in (130, 143) else FAILED
        member.reason = "" if code == 0 else _reason(Path(member.log), code)
        with contextlib.suppress(TrainerError):  # it ended before it had a folder or a loss
            member.folder = files.read_json(self._result(member))["folder"]
            self._result(member).unlink()
            summary = files.read_json(Path(member.folder) / "summary.json")
            member.best_loss, member.last_loss = summary["best_val_loss"], summary["last_val_loss"]
            member.psnr, member.minutes = summary["final"].get("val/psnr"), round(summary["seconds"] / 60, 1)
        loss = f", held-out loss {member.best_loss:.4f}" if member.best_loss is not None else ""
        print_line(
            f"[{member.number}/{len(self.members)}] {member.title}: {member.status}{loss}{member.reason and f': {member.reason}'}"
        )
        self._write()

    # What is kept and shown

    def _read(self) -> dict[str, Any]:
        try:
            return files.read_json(self.folder / "sweep.json")
        except TrainerError:
            return {}

    def _write(self) -> None:
        files.write_json(
            self.folder / "sweep.json", {**self._note, "members": [asdict(member) for member in self.members]}
        )

    def _shown(self, journal: Any) -> Sink:
        from trainer.tracking import open_sink

        varied = [f"{key}={','.join(values)}" for key, values in _values(self.members).items()]
        return open_sink(
            self.tracking,
            self.out,
            self.folder,
            journal,
            name=f"sweep {short(varied)[:230]} [{self.folder.name[:6]}]",
            params={},
            tags={
                "trainer.sweep": self.folder.name,
                "trainer.folder_id": self._note["folder_id"],
                "trainer.folder": str(self.folder.absolute()),
                "trainer.host": socket.gethostname(),
            },
            description=f"**Sweep** of {len(self.members)} runs, going on. Folder: `{self.folder.absolute()}`",
        )

    def _sum_up(self, sink: Sink, journal: Journal) -> None:
        """Tables and pictures in the folder, on the terminal and in MLflow."""
        from trainer.tracking import gather, links, page

        files.write(self.folder / "ranking.csv", ranking_csv(self.members))
        pictures = [picture for picture in (self._heat_map(), self._samples()) if picture]
        best = ranked(self.members)
        if best:
            # Its run shows what the sweep has reached, beside runs that stand alone.
            reached = {"val/loss": best[0].best_loss, "val/psnr": best[0].psnr}
            journal.metrics(len(best), {name: value for name, value in reached.items() if _is_number(value)})
        # The best first, as in the table.
        runs = [Path(member.folder) for member in [*best, *(m for m in self.members if m not in best)] if member.folder]
        where = links(self.tracking, sink, runs)
        linked = "".join(f"\n{title}: {link}" for title, link in where.items())
        if where and not (served := page(self.tracking, self.out)).startswith("http"):
            linked += f"\nthey are served by: {served}"
        table = ranking(self.members)
        files.write(self.folder / "ranking.md", f"# Sweep {self.folder.name}\n\n{table}\n{linked}\n")
        print_line(f"\n{_aligned(table)}\n{linked}")
        for picture in pictures:
            print_line(f"{picture}")
        result = (
            f"**Best: {_short(best[0])}**, val/loss {best[0].best_loss:.4f}"
            if best
            else "**None finished with a held-out loss**"
        )
        pages = " | ".join(
            f"[{title}]({''.join(link.partition('#')[1:])})" for title, link in where.items() if title != "summary"
        )
        gather(
            self.tracking,
            self.out,
            sink,
            runs,
            description=f"{result}; of {len(self.members)} runs, ranked by val/loss (held out; lower is better).\n\n{pages}\n\n{table}"
            + f"\n\nFolder: `{self.folder.absolute()}`",
            artifacts=[self.folder / "ranking.csv", self.folder / "ranking.md", *pictures],
            varied=list(_values(self.members)),
        )

    def _heat_map(self) -> Path | None:
        """Held-out loss over two varied numbers; None where something else varies."""
        from trainer.tracking import curves

        values = _values(self.members)
        try:
            axes = {key: sorted({float(value) for value in options}) for key, options in values.items()}
        except ValueError:
            return None
        if len(axes) != 2:
            return None
        (y, rows), (x, columns) = axes.items()
        losses = [[math.nan] * len(columns) for _ in rows]
        for member in ranked(self.members):
            losses[rows.index(float(member.varied[y]))][columns.index(float(member.varied[x]))] = member.best_loss
        return curves.draw_heat_map(self.folder / "heat_map.png", "best val/loss", (x, columns), (y, rows), losses)

    def _samples(self) -> Path | None:
        """The last pictures of the first held-out scenes, the members beside each other from best to worst."""
        from trainer.dataset import strip

        best = ranked(self.members)[:8]
        with contextlib.suppress(OSError, ValueError, IndexError):
            folders = [max((Path(member.folder) / "pictures").glob("step-*")) for member in best]
            rows = []
            for sample in (1, 2):
                images = [strip.load(folder / f"{sample}.png") for folder in folders]
                if len({image.shape for image in images}) != 1:
                    return None
                titles = [_short(member) for member in best]
                rows.append(strip.strip(dict(zip(titles, images, strict=True))))
            strip.save(self.folder / "samples.png", strip.sheet(rows))
            return self.folder / "samples.png"
        return None

    # Signals

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM is kept for the loop, a second ends everything at once."""

        def handle(number: int, frame: object) -> None:
            if not self._signal:
                self._signal = number
                return
            for process, _ in self._running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            os._exit(128 + number)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# The table


def ranked(members: Sequence[Member]) -> list[Member]:
    """Those that finished with a held-out loss, the best first."""
    return sorted(
        (m for m in members if m.status == FINISHED and _is_number(m.best_loss)), key=lambda m: (m.best_loss, m.number)
    )


def ranking(members: Sequence[Member]) -> str:
    """A Markdown table: the ranked members, then the others and why they have no place."""
    keys = list(_values(members))
    lines = [["rank", *keys, "val/loss best", "last", "val/psnr", "minutes", "status", "folder"]]
    best = ranked(members)
    for place, member in enumerate(best, 1):
        lines.append([f"{place}", *_row(member, keys), member.status, f"`{member.folder}`"])
    others = [member for member in members if member not in best]
    for member in others:
        lines.append(["", *_row(member, keys), member.status, f"`{member.folder}`" if member.folder else ""])
    lines.insert(1, ["---"] * len(lines[0]))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    reasons = "\n".join(f"- {m.title}: {m.reason} (log `{m.log}`)" for m in others if m.reason)
    return f"{table}\n\n{reasons}\n" if reasons else f"{table}\n"


def ranking_csv(members: Sequence[Member]) -> str:
    """The same as CSV, with all digits and all members."""
    keys, best = list(_values(members)), ranked(members)
    columns = ("best_loss", "last_loss", "psnr", "minutes", "status", "code", "reason", "folder", "log")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["rank", "member", *keys, *columns])
    for member in [*best, *(member for member in members if member not in best)]:
        rank = best.index(member) + 1 if member in best else ""
        table.writerow(
            [
                rank,
                member.number,
                *(member.varied.get(key, "") for key in keys),
                *(getattr(member, name) for name in columns),
            ]
        )
    return text.getvalue()


def _row(member: Member, keys: Sequence[str]) -> list[str]:
    numbers = (member.best_loss, ".4f"), (member.last_loss, ".4f"), (member.psnr, ".2f"), (member.minutes, ".1f")
    return [member.varied.get(key, "") for key in keys] + [
        format(value, form) if _is_number(value) else "" for value, form in numbers
    ]


def _aligned(table: str) -> str:
    """The Markdown table as a terminal shows it best."""
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [line for line in table.splitlines() if line.startswith("- ")])


def _vary(members: Sequence[Member]) -> None:
    """Set what tells the members from each other."""
    settings = [member.settings for member in members]
    keys = dict.fromkeys(key for own in settings for key in own)
    varied = [key for key in keys if len({own.get(key) for own in settings}) > 1]
    for member, own in zip(members, settings, strict=True):
        member.varied = {key: own[key] for key in varied if key in own}


def _values(members: Sequence[Member]) -> dict[str, list[str]]:
    """The values of each setting that varies."""
    found: dict[str, dict[str, None]] = {}
    for member in members:
        for key, value in member.varied.items():
            found.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in found.items()}


def _short(member: Member) -> str:
    return short([f"{key}={value}" for key, value in member.varied.items()]) or f"{member.number}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _reason(log: Path, code: int) -> str:
    """Why a member ended: by which signal, or its last words."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (as the kernel does when memory runs out)" if name == "SIGKILL" else "")
    try:
        words = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    except OSError:
        words = []
    return next((" ".join(line.split())[:500] for line in reversed(words) if line.strip()), f"exit code {code}")


def _run_of(sink: Sink, stopped: Any) -> str | None:
    """MLflow's id of the sweep's run, None where it does not answer; members are then put under it at the end, if it is back."""
    while not sink.flush(0.2) and not sink.errors and not stopped():
        pass
    return sink.run_id
