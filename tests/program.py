"""Runs the real program in tests of interruptions and faults: `main(argv)` in a forked child of this process.

Processes and signals are real, but a child needs no time for imports.
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
from trainer.training.checkpoint_format import Checkpoint

# Modules that a run imports when it needs them, imported here once for all children.
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
TIMEOUT = 60
"""Seconds after which a run counts as hanging."""
SCHEDULE = ["steps=5", "batch=4", "save.every=2", "evaluation.every=2"]
"""Two epochs of ten samples. Evaluations, saves and the end of an epoch follow each other in every possible order."""
SMALL = ["sample.steps=1", "evaluation.images=1", "tracking=none", "hardware=cpu"]
DEMO = ["dataset.pairs=10", "dataset.held_out=3"]
CHANGE_EVENTS = {"os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir"}
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR


@dataclass(slots=True)
class Result:
    """How a process ended."""

    code: int
    """Exit code, or minus the signal that killed the process."""
    output: str
    """What it wrote to stdout and stderr."""
    seconds: float


@dataclass(slots=True)
class RunningProgram:
    """A process in a session of its own. Its output goes to a file."""

    pid: int
    output: Path
    start_time: float = field(default_factory=time.monotonic)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def signal_all(self, number: int) -> None:
        """Signals the process and all its children, as a terminal or a batch system does."""
        os.killpg(self.pid, number)

    def wait(self) -> Result:
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            seconds = time.monotonic() - self.start_time
            if pid:
                return Result(os.waitstatus_to_exitcode(status), self.output.read_text(), seconds)
            if seconds > scale_timeout(TIMEOUT):
                self.signal_all(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"the program hangs; its output:\n{self.output.read_text()}")
            time.sleep(0.005)


def scale_timeout(seconds: float) -> float:
    """Returns a longer timeout if more processes want to run than there are processors."""
    return seconds * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


# Starting the program


def start(arguments: list[str], output: Path, setup: Action | None = None) -> RunningProgram:
    """Starts the program in a forked child, in which `setup` runs first, to prepare a fault for example."""
    output.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return RunningProgram(pid, output)
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)
        if setup:
            setup()
        code = main(arguments)
        sys.stdout.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
    finally:  # The child must never continue as a second pytest.
        os._exit(99)


def start_module(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    """Starts `python -m trainer`, for tests of what happens before or after `main`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments], stderr=subprocess.PIPE, text=True, env=environment, **options
    )


# Setups


def at_call(where: str, call: int, action: Action, after: bool = False) -> Action:
    """Returns a setup: `action` runs just before (or after) the n-th call (from 1) of a function "module:Class.name".

    The module must be the one in which the caller looks the function up.
    """

    def set_up() -> None:
        module, _, path = where.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        function, count = getattr(owner, name), 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            is_chosen = count == call
            if is_chosen and not after:
                action()
            result = function(*arguments, **options)
            if is_chosen and after:
                action()
            return result

        setattr(owner, name, counted)

    return set_up


def kill_within(where: str, call: int, number: int) -> Action:
    """Returns a setup: the process is killed within a call of a function, before the file operation of this number.

    Both numbers count from 1. File operations are syncs, and all operations that change the disk, for which Python
    raises audit events.
    """

    def watch() -> None:
        count = 0

        def operation(*_: object) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, values: tuple) -> None:
            if event in CHANGE_EVENTS or (event == "open" and values[2] & WRITE_FLAGS):
                operation()

        # The death of a process loses no data that it has written, so there is no need to wait for the disk.
        os.fsync = operation
        sys.addaudithook(hook)

    def stop_watching() -> None:
        nonlocal number
        number = 0

    return run_all(at_call(where, call, watch), at_call(where, call, stop_watching, after=True))


def raise_signal(number: int) -> Action:
    """Returns an action: the process sends itself a signal."""
    return lambda: os.kill(os.getpid(), number)


def run_all(*actions: Action) -> Action:
    """Returns an action that runs all actions."""
    return lambda: [action() for action in actions]


# Runs of a tiny model

FAMILY = "flux_kontext"
"""The family of tests that are not about a family."""


class Harness:
    """Runs the program with a tiny model, and compares runs with an uninterrupted one, the reference.

    `family` is a name of the config group `model`.
    """

    def __init__(self, folder: Path, family: str = FAMILY):
        self.folder = folder
        torch.set_num_threads(1)
        tiny = GROUPS["model"][family].save_tiny_checkpoint(folder / "model")
        self.settings = [f"model={family}", *tiny, *SMALL, f"cache.path={folder / 'cache'}"]
        # Python and its libraries do some work at the first use of a class. Here it is done once for all children.
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*self.settings, *DEMO, *SCHEDULE, f"out={folder}", "stage=check"]) == 0
        curves.draw_curves(folder)
        self._references: dict[tuple[str, ...], tuple[Path, float]] = {}
        self._templates: dict[str, Path] = {}
        self._folder_count = 0

    def new_folder(self) -> Path:
        """Creates an empty folder for runs."""
        self._folder_count += 1
        folder = self.folder / f"{self._folder_count}"
        folder.mkdir()
        return folder

    def start(self, out: Path, *settings: str, setup: Action | None = None) -> RunningProgram:
        dataset = [] if any(setting.startswith("dataset=") for setting in settings) else DEMO
        arguments = [*self.settings, *dataset, *SCHEDULE, f"out={out}", *settings]
        return start(arguments, self.folder / "outputs" / f"{out.name}-{time.monotonic_ns()}.txt", setup)

    def run(self, out: Path, *settings: str, setup: Action | None = None) -> Result:
        """Runs the program with these settings until it ends."""
        return self.start(out, *settings, setup=setup).wait()

    def finish(self, out: Path, *settings: str, setup: Action | None = None) -> Path:
        """Runs the program, which must succeed. Returns the run folder."""
        result = self.run(out, *settings, setup=setup)
        assert result.code == 0, result
        return single_run(out)

    def reference(self, *settings: str) -> Path:
        """Returns the folder of an uninterrupted run with these settings."""
        return self._reference(settings)[0]

    def seconds(self, *settings: str) -> float:
        """Returns the duration of an uninterrupted run with these settings."""
        return self._reference(settings)[1]

    def template(self, name: str, make: Callable[[Path], Path]) -> Path:
        """Returns the result of `make` for a new folder, which runs once for each name. Tests change copies of it."""
        if name not in self._templates:
            self._templates[name] = make(self.new_folder())
        return self._templates[name]

    def _reference(self, settings: tuple[str, ...]) -> tuple[Path, float]:
        if settings not in self._references:
            start_time = time.monotonic()
            self._references[settings] = self.finish(self.new_folder(), *settings), time.monotonic() - start_time
        return self._references[settings]

    def assert_equals_reference(self, folder: Path, *settings: str) -> None:
        """Asserts that a run has the bits of the reference, and the same losses, each once, in its journal."""
        reference = self.reference(*settings)
        assert fingerprint(folder) == fingerprint(reference)
        assert losses(folder) == losses(reference)
        assert best_loss(folder) == best_loss(reference)
        assert exported_files(folder) == exported_files(reference) != []
        assert unfinished_files(folder) == []


# What is in a run folder


def single_run(out: Path) -> Path:
    """Returns the folder of the only run in `out`."""
    (folder,) = (path.parent for path in out.glob("*/run.json"))
    return folder


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Returns the newest undamaged checkpoint of a run, whose folder does not change."""
    return Checkpoints(folder / "checkpoints", 1).newest(set_aside=False)


def fingerprint(folder: Path, state: bool = True) -> str:
    """Returns a hash of everything in the newest checkpoint, with or without its state, which evaluations change."""
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    values = [checkpoint.step, checkpoint.state if state else None]
    return hash_tensors([*values, checkpoint.weights, checkpoint.optimizer, checkpoint.ema])


def hash_tensors(value: Any) -> str:
    """Returns the sha256 of every bit of nested lists and dicts of tensors and other values."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(repr((value.dtype, value.shape)).encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()


def best_loss(folder: Path) -> tuple[int, float] | None:
    """Returns step and held-out loss of the best checkpoint."""
    checkpoint = Checkpoints(folder / "checkpoints", 1).best()
    return checkpoint and (checkpoint.step, checkpoint.state["val_loss"])


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the records of a kind in the journal."""
    return [record for _, record in journal.read_records(folder / journal.FILE_NAME) if record["kind"] == kind]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """Returns (step, name, value) of every loss in the journal, in the order of its lines."""
    return [
        (record["step"], name, value)
        for record in records(folder, "metrics")
        for name, value in record["values"].items()
        if "loss" in name
    ]


def last_logged_step(folder: Path) -> int:
    """Returns the last step in the journal; 0 if there is none."""
    return max((step for step, name, _ in losses(folder) if name == "train/loss"), default=0)


def unfinished_files(folder: Path) -> list[Path]:
    """Returns temporary files and folders, of which a run must leave none."""
    return [path for path in folder.rglob(".*") if path.name.startswith((".partial-", ".discarded-"))]


def exported_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in (folder / "export").rglob("*"))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Path -> modification time and contents, of a folder and everything in it."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


def copy_folder(folder: Path, parent: Path) -> Path:
    """Copies a folder into another one, so that the copy can be changed. Returns the copy."""
    return Path(shutil.copytree(folder, parent / folder.name))


def session_processes(session: int) -> list[psutil.Process]:
    """Returns the living processes of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
