"""What a user sees on a terminal: one progress bar, and messages on lines of their own."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.core.bars import ProgressBar
from trainer.core.console import print_line
from trainer.tracking.journal import Journal
from trainer.training.loop import Step
from trainer.training.progress import Progress
from trainer.training.run_log import log_to_folder

COLUMNS = 100
TRAINING = ["steps=6", "batch=2", "save.every=100", "evaluation.every=3", "evaluation.images=1", "sample.steps=1"]
CHEAP = ["dataset.pairs=10", "dataset.held_out=3", "tracking=none", "hardware=cpu"]


def screen(output: str) -> list[str]:
    """Returns the lines that a terminal shows after this output: what is under the cursor is overwritten."""
    lines = [""]
    column = 0
    assert "\x1b" not in output, "the emulator knows no escape sequences"
    for character in output:
        if character == "\n":
            lines.append("")
        elif character == "\r":
            column = 0
        else:
            if column == COLUMNS:
                lines.append("")
                column = 0
            lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


class Terminal:
    """A pseudoterminal, and what was written to it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (40, COLUMNS))
        self.output = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        # Linux raises an error at the end.
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 4096):
                self.output += data.decode(errors="replace")

    def close(self) -> list[str]:
        """Returns the screen once all writers have closed the terminal."""
        os.close(self.slave)
        self._thread.join()
        os.close(self.master)
        return screen(self.output)


@contextlib.contextmanager
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Replaces stdout and stderr by a terminal. The list has its lines when the block has ended."""
    terminal = Terminal()
    lines: list[str] = []
    with open(os.dup(terminal.slave), "w", buffering=1) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield lines
    lines += terminal.close()


def step(number: int) -> Step:
    return Step(number, loss=0.5, grad_norm=1.0, lr=1e-3)


def test_messages_do_not_run_into_the_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with (
        on_terminal(monkeypatch) as lines,
        Journal(tmp_path) as journal,
        log_to_folder(tmp_path, journal),
        Progress(4, 0, 2) as progress,
    ):
        progress.advance(step(1))
        print_line("a line")
        progress.advance(step(2))
        logging.getLogger("trainer.tracking").warning("a warning of the log")
        progress.advance(step(3))
        warnings.warn("a warning of Python", stacklevel=1)
        progress.advance(step(4))
        progress.close()
        print_line("done at step 4")
    assert lines[:2] == ["a line", "a warning of the log"]
    assert lines[2].endswith("UserWarning: a warning of Python")
    bar, done, end = lines[-3:]
    assert bar.startswith("training: 100%|") and "| 4/4 [" in bar and "loss 0.5000, lr 1.00e-03]" in bar
    assert (done, end) == ("done at step 4", "")
    assert sum("training" in line for line in lines) == 1
    assert "a warning of Python" in (tmp_path / "log.txt").read_text()


def test_the_bar_shows_what_the_run_does(monkeypatch: pytest.MonkeyPatch):
    shown: list[str] = []
    monkeypatch.setattr(ProgressBar, "display", lambda bar, *_, **__: shown.append(str(bar)))
    with on_terminal(monkeypatch), Progress(4, 0, 2) as progress:
        with progress.activity("evaluating"):
            assert shown[-1].startswith("evaluating:   0%|")
        print_line("step 0: held-out loss 1")
        assert shown[-1].startswith("training:   0%|")


def test_the_rate_counts_neither_the_first_step_nor_evaluations(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr("trainer.training.progress.time.perf_counter", lambda: now)
    with on_terminal(monkeypatch), Progress(13, 0, 2) as progress:
        now += 100
        progress.advance(step(1))
        assert progress.bar.postfix == "loss 0.5000, lr 1.00e-03"
        for number in (2, 3):
            now += 2
            progress.advance(step(number))
        assert progress.bar.postfix == "00:20 left, 2.00 s/step, loss 0.5000, lr 1.00e-03"
        with progress.paused():
            now += 3
        now += 2
        assert progress.advance(step(4)) == {"perf/steps_per_second": 0.5, "perf/samples_per_second": 1.0}
        # The evaluation counts here: nine seconds for three steps.
        assert progress.bar.postfix == "00:27 left, 2.00 s/step, loss 0.5000, lr 1.00e-03"


def test_another_thread_can_print_after_a_signal_interrupts_the_bar(monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with on_terminal(monkeypatch) as lines, Progress(4, 0, 2) as progress:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ProgressBar, "display", interrupt)
            progress.bar.refresh()
        thread = threading.Thread(target=print_line, args=["from a thread"], daemon=True)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert lines[0] == "from a thread"


def test_a_file_gets_few_lines_and_no_control_characters(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(50, 0, 2) as progress:
        for number in range(1, 51):
            progress.advance(step(number))
            with progress.activity("evaluating"):
                pass
            if number == 30:
                print_line("step 30: held-out loss 1")
    lines = stream.getvalue().split("\n")
    assert "\r" not in stream.getvalue()
    assert [re.sub(r"\d+/.*", "", line) for line in lines] == [
        "training:   0%|          | ",
        "step 30: held-out loss 1",
        "training: 100%|##########| ",
        "",
    ]


@pytest.mark.slow
def test_the_screen_of_a_run_that_is_interrupted_and_continued(tmp_path: Path):
    def run(interrupt_when: Callable[[str], bool] | None, *settings: str) -> list[str]:
        terminal = Terminal()
        command = [sys.executable, "-m", "trainer", *TRAINING, *CHEAP, f"out={tmp_path}", *settings]
        process = subprocess.Popen(command, stdout=terminal.slave, stderr=terminal.slave, start_new_session=True)
        while process.poll() is None:
            if interrupt_when and interrupt_when(terminal.output):
                process.send_signal(signal.SIGINT)
                interrupt_when = None
            time.sleep(0.01)
        return terminal.close()

    lines = run(lambda output: "step 3: " in output, "steps=300")
    (stop,) = [line for line in lines if "stopped by Ctrl-C" in line or "saved at step" in line]
    assert stop.startswith("stopped by Ctrl-C: saved at step ") and [line for line in lines if line][-1] == stop

    lines = run(None)
    evaluations = [
        line for line in lines if re.match(r"step \d+: held-out loss [\d.]+, best [\d.]+, psnr [\d.]+$", line)
    ]
    assert [line.split(":")[0] for line in evaluations] == ["step 0", "step 3", "step 6"]
    done = next(i for i, line in enumerate(lines) if line.startswith("done at step 6: held-out loss"))
    assert lines[done - 1].startswith("training: 100%|")
    assert not any("training:" in line for line in lines[done:])
    assert all(line.startswith(("training: 100%|", "encoding: 100%|")) for line in lines if "%|" in line)
