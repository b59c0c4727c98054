"""The real program for tests of its deaths and endings: `main(argv)` in a forked child of this process, which has only imported.

Real processes and real signals, without the seconds of imports that `python -m trainer` takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.__main__ import main
from trainer.config.groups import GROUPS
from trainer.tracking import curves, journal
from trainer.training.checkpoint import Checkpoints

# What a run imports when it needs it, here imported once for all children.
for name in (
    "diffusers",
    "hydra",
    "matplotlib.backends.backend_agg",
    "peft",
    "tqdm",
    "trainer.run",
    "trainer.evaluation.sampling",
    "transformers",
    "yaml",
):
    importlib.import_module(name)

Action = Callable[[], object]
LIMIT = 60
"""Seconds after which a run counts as hanging."""
SCHEDULE = ["steps=5", "batch=4", "save.every=2", "evaluation.every=2"]
"""Two epochs of ten samples: every way in which evaluation, saving and the border of an epoch can follow each other."""
SMALL = ["sample.steps=1", "evaluation.images=1", "tracking=none", "hardware=cpu"]
DEMO = ["dataset.pairs=10", "dataset.held_out=3"]


@dataclass(slots=True)
class Ended:
    """How a process ended: its exit code (minus the signal that killed it), what it printed, the seconds it took."""

    code: int
    text: str
    seconds: float


@dataclass(slots=True)
class Started:
    """A process with a session of its own, whose output goes to a file."""

    pid: int
    output: Path
    began: float = field(default_factory=time.monotonic)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def signal_all(self, number: int) -> None:
        """As a terminal or a batch system does: to the process and all that it started."""
        os.killpg(self.pid, number)

    def wait(self) -> Ended:
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            seconds = time.monotonic() - self.began
            if pid:
                return Ended(os.waitstatus_to_exitcode(status), self.output.read_text(), seconds)
            if seconds > at_leisure(LIMIT):
                self.signal_all(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"the program hangs; it said:\n{self.output.read_text()}")
            time.sleep(0.005)


def at_leisure(seconds: float) -> float:
    """How long so many seconds are where more processes want to run than there are processors."""
    return seconds * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def start(arguments: list[str], output: Path, before: Action | None = None) -> Started:
    """Fork the program; `before` runs first in the child, to set the scene for its death."""
    output.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Started(pid, output)
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)
        if before:
            before()
        code = main(arguments)
        sys.stdout.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
    finally:  # the child must never go on as a second pytest
        os._exit(99)


def command(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    """`python -m trainer`, for what happens before or after `main`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments], stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def at(where: str, call: int, action: Action, after: bool = False) -> Action:
    """A scene: `action` happens just before (or after) the call of this number, from 1, of a function like "trainer.run:build"."""

    def set_up() -> None:
        module, _, path = where.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        function, count = getattr(owner, name), 0

        def watched(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            now = count == call
            if now and not after:
                action()
            result = function(*arguments, **options)
            if now and after:
                action()
            return result

        setattr(owner, name, watched)

    return set_up


CHANGES = {"os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR


def dying_within(where: str, call: int, number: int) -> Action:
    """A scene: within the call of this number of a function the process is killed before its operation on files of this number, both from
    1. The operations are what Python announces of all that changes the disk, and the syncs."""

    def watch() -> None:
        count = 0

        def operation(*_: object) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        # The death of a process loses nothing that was written, so that the waiting can be spared.
        os.fsync = operation
        sys.addaudithook(
            lambda event, values: operation() if event in CHANGES or (event == "open" and values[2] & WRITING) else None
        )

    def out_of_it() -> None:
        nonlocal number
        number = 0

    return all_of(at(where, call, watch), at(where, call, out_of_it, after=True))


def to_itself(number: int) -> Action:
    """The process sends itself a signal."""
    return lambda: os.kill(os.getpid(), number)


def all_of(*actions: Action) -> Action:
    return lambda: [action() for action in actions]


class Lab:
    """A tiny model's command line in one folder, and the uninterrupted run (REF) to compare others with; the first family's or that of a name."""

    def __init__(self, folder: Path, name: str | None = None):
        self.folder = folder
        name = name or next(iter(GROUPS["model"]))
        kind = GROUPS["model"][name]
        torch.set_num_threads(1)
        self.settings = [f"model={name}", *kind.save_tiny_checkpoint(folder / "model"), *SMALL, f"cache.path={folder / 'cache'}"]
        # What Python and its libraries do at the first use of a class, once for all children.
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*self.settings, *DEMO, *SCHEDULE, f"out={folder}", "stage=check"]) == 0
        curves.draw_curves(folder)
        self._references: dict[tuple[str, ...], tuple[Path, float]] = {}
        self._templates: dict[str, Path] = {}
        self._count = 0

    def place(self) -> Path:
        """A new folder for runs."""
        self._count += 1
        folder = self.folder / f"{self._count}"
        folder.mkdir()
        return folder

    def start(self, out: Path, *settings: str, before: Action | None = None) -> Started:
        data = [] if any(setting.startswith("dataset=") for setting in settings) else DEMO
        arguments = [*self.settings, *data, *SCHEDULE, f"out={out}", *settings]
        return start(arguments, self.folder / "outputs" / f"{out.name}-{time.monotonic_ns()}.txt", before)

    def run(self, out: Path, *settings: str, before: Action | None = None) -> Ended:
        """The program with these settings, until it ends."""
        return self.start(out, *settings, before=before).wait()

    def finish(self, out: Path, *settings: str, before: Action | None = None) -> Path:
        """The same for a run that must succeed; its folder."""
        ended = self.run(out, *settings, before=before)
        assert ended.code == 0, ended
        return only_run(out)

    def reference(self, *settings: str) -> Path:
        """The folder of an uninterrupted run with these settings."""
        return self._reference(settings)[0]

    def template(self, name: str, make: Callable[[Path], Path]) -> Path:
        """What `make` made in a folder of its own when it was first asked for, to be copied."""
        if name not in self._templates:
            self._templates[name] = make(self.place())
        return self._templates[name]

    def seconds(self, *settings: str) -> float:
        """How long an uninterrupted run takes."""
        return self._reference(settings)[1]

    def _reference(self, settings: tuple[str, ...]) -> tuple[Path, float]:
        if settings not in self._references:
            began = time.monotonic()
            self._references[settings] = self.finish(self.place(), *settings), time.monotonic() - began
        return self._references[settings]

    def assert_as_if_never_stopped(self, folder: Path, *settings: str) -> None:
        """That a run ended with the bits of REF, and that its journal tells of each step once, with the same losses."""
        reference = self.reference(*settings)
        assert fingerprint(folder) == fingerprint(reference)
        assert losses(folder) == losses(reference)
        assert best(folder) == best(reference)
        assert exported(folder) == exported(reference) != []
        assert leftovers(folder) == []


def only_run(out: Path) -> Path:
    (folder,) = (path.parent for path in out.glob("*/run.json"))
    return folder


def checkpoint(folder: Path):
    """The newest good checkpoint of a run's folder, which is left as it is."""
    return Checkpoints(folder / "checkpoints", 1).newest(set_aside=False)


def fingerprint(folder: Path, state: bool = True) -> str:
    """H: of step, weights, optimizer, average and (what evaluations left) state of the newest checkpoint."""
    loaded = checkpoint(folder)
    return digest([loaded.step, loaded.state if state else None, loaded.weights, loaded.optimizer, loaded.ema])


def digest(value: Any) -> str:
    """sha256 over every bit of tensors in lists and dicts, and of what stands beside them."""
    result = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            result.update(repr((value.dtype, value.shape)).encode())
            result.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                result.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            result.update(repr(value).encode())

    add(value)
    return result.hexdigest()


def best(folder: Path) -> tuple[int, float] | None:
    """Step and held-out loss of the weights that a run would be used with."""
    loaded = Checkpoints(folder / "checkpoints", 1).best()
    return loaded and (loaded.step, loaded.state["val_loss"])


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for _, record in journal.read_records(folder / journal.FILE_NAME) if record["kind"] == kind]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """Every loss in the journal, in the order of its lines."""
    return [
        (r["step"], key, value)
        for r in records(folder, "metrics")
        for key, value in r["values"].items()
        if "loss" in key
    ]


def last_step(folder: Path) -> int:
    """The last step that a run finished, as its journal tells; 0 before the first."""
    return max((step for step, key, _ in losses(folder) if key == "train/loss"), default=0)


def processes(session: int) -> list[psutil.Process]:
    """Those of a session that still live."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def leftovers(folder: Path) -> list[Path]:
    """What should not be in a folder when nobody works in it."""
    return [path for path in folder.rglob(".*") if path.name.startswith((".partial-", ".discarded-"))]


def exported(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in (folder / "export").rglob("*"))


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below with its time and bytes."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


def copied(folder: Path, to: Path) -> Path:
    """The folder of a run under another `out`, to be stopped or damaged."""
    return Path(shutil.copytree(folder, to / folder.name))
