"""Measures commands that run in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

CHILD = Path(__file__).parent / "child.py"


@dataclass(slots=True)
class Usage:
    """Wall-clock time and CPU time of a process in seconds; its memory in MiB at the peak, or when it was stopped."""

    seconds: float
    cpu_seconds: float
    memory: float


def trainer_command(*settings: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *settings]


def run(command: Sequence[object], cwd: Path | None = None) -> Usage:
    """Runs a command to its end."""
    words = [str(word) for word in command]
    done = subprocess.run([sys.executable, "-S", CHILD, *words], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    return Usage(**json.loads(done.stdout))


def run_until(reached: Callable[[], bool], command: Sequence[object]) -> Usage:
    """Runs a command until `reached` returns true, and kills it then."""
    words = [str(word) for word in command]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(words, stdout=output, stderr=output)
        try:
            while not reached():
                if process.poll() is not None:
                    output.seek(0)
                    raise SystemExit(f"{' '.join(words)}\n{output.read().decode()}")
                time.sleep(0.01)
            status = psutil.Process(process.pid)
            seconds = time.perf_counter() - start
            return Usage(seconds, sum(status.cpu_times()[:2]), status.memory_info().rss / 2**20)
        finally:
            process.kill()
            process.wait()
