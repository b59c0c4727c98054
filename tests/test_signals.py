"""Tests of signals during imports; tests/faults_interruptions.py has signals at all other moments."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.core.errors import Interrupted
from trainer.core.signals import POLL_INTERVAL, Signals

SEND = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n"
"""Start of a module that receives SIGTERM while it is imported."""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yields a folder on the path of Python, for modules with names that begin with `signaled_`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("signaled_")]:
        del sys.modules[name]


def wait_for_signal() -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_signal_waits_until_the_outermost_import_has_ended(modules: Path):
    (modules / "signaled_inner.py").write_text(SEND)
    # A module that looks for another one in vain often catches whatever the import raises.
    (modules / "signaled_outer.py").write_text(
        "try:\n    import signaled_inner\nexcept BaseException:\n    pass\ndone = 1"
    )
    with Signals(exits=False) as signals, pytest.raises(Interrupted, match="SIGTERM"):
        importlib.import_module("signaled_outer")
        wait_for_signal()
    assert sys.modules["signaled_outer"].done == 1 and signals.seen == signal.SIGTERM
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_program_that_is_imported_itself_is_interrupted_at_once(modules: Path):
    (modules / "signaled_script.py").write_text(
        "from trainer.core.signals import Signals\nwith Signals(exits=False):\n    "
        + SEND.replace("\n", "; ")
        + "\n    raise AssertionError('not interrupted')\n"
    )
    with pytest.raises(Interrupted):
        importlib.import_module("signaled_script")


@pytest.mark.parametrize("how", ["deferred", "recorded", "seen"])
def test_a_signal_during_an_import_is_not_raised_inside_a_later_block(modules: Path, how: str):
    # The block begins before the program notices that the import has ended.
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])"
    (modules / "signaled_module.py").write_text(SEND.replace("\n", f"\n{block}\n", 1))
    reached = []
    with Signals(exits=False) as signals:
        importlib.import_module("signaled_module")
        try:
            if how == "deferred":
                # Raised before the block, which would otherwise run to its end although the program should stop.
                with pytest.raises(Interrupted), signals.deferred():
                    reached.append("block")
            with signals.recorded() if how == "recorded" else contextlib.nullcontext():
                assert signals.seen == signal.SIGTERM
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        time.sleep(3 * POLL_INTERVAL)
    assert reached == []


def test_a_second_signal_during_an_import_is_raised_at_once(modules: Path):
    (modules / "signaled_twice.py").write_text(SEND + "os.kill(os.getpid(), signal.SIGINT)\nraise AssertionError\n")
    with Signals(exits=False), pytest.raises(Interrupted, match=r"Ctrl-C"):
        importlib.import_module("signaled_twice")


def test_a_forked_worker_that_is_importing_ends_at_sigterm(modules: Path):
    (modules / "signaled_worker.py").write_text(SEND + "import time\ntime.sleep(20)\n")
    with Signals(exits=False):
        child = os.fork()
        if child == 0:
            importlib.import_module("signaled_worker")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
