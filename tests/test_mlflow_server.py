"""Tests of the MLflow tracker with real servers and with several processes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow_helpers import (
    TIMEOUT,
    images_in_mlflow,
    log_image,
    log_steps,
    open_tracker,
    server,
    status_in_mlflow,
    steps_in_mlflow,
)

from trainer.core import files
from trainer.core.errors import UsageError
from trainer.tracking import mlflow_store, mlflow_tracker, ui
from trainer.tracking.journal import Journal

ROOT = Path(__file__).resolve().parents[1]


class Proxy:
    """A proxy in front of a server. While `drop_answers` is set, requests reach the server and its answers get lost."""

    def __init__(self, port: int):
        self.port, self.drop_answers, self.dropped = port, False, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._forward, args=self.listener.accept()[:1], daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self.port)) as server:
            threading.Thread(target=self._copy, args=(client, server), daemon=True).start()
            while answer := server.recv(65536):
                if self.drop_answers:
                    self.dropped += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(answer)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)


@pytest.mark.slow  # starts the server twice
def test_server_that_goes_down_and_comes_back_gets_every_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "trainer.tracking")
    monkeypatch.setattr(mlflow_tracker, "PERIOD", 0.2)
    port = ui.free_port(5600)
    proxy = Proxy(port)
    folder = tmp_path / "run"
    folder.mkdir()
    with Journal(folder) as journal, open_tracker(folder, journal, proxy.url) as tracker:
        begin = time.perf_counter()
        log_steps(journal, *range(1, 51))
        log_image(folder, journal, 50)
        # The server is down at the start, and training continues.
        assert time.perf_counter() - begin < 3 and not tracker.flush(3) and tracker.run_id is None
        with server(tmp_path, port) as process:
            assert tracker.flush(TIMEOUT) and status_in_mlflow(tracker) == "RUNNING"
            proxy.drop_answers = True
            log_steps(journal, *range(51, 1551))
            log_image(folder, journal, 100)
            deadline = time.monotonic() + TIMEOUT
            while proxy.dropped < 3 and time.monotonic() < deadline:
                time.sleep(0.1)
            proxy.drop_answers = False
            log_steps(journal, *range(1551, 1601))
            assert tracker.flush(TIMEOUT)
            os.killpg(process.pid, signal.SIGKILL)
        log_steps(journal, *range(1601, 1701))
        assert not tracker.flush(1)
        with server(tmp_path, port):
            log_image(folder, journal, 1700)
            assert tracker.flush(TIMEOUT)
            steps = list(range(1, 1701))
            assert steps_in_mlflow(tracker) == {"train/loss": steps, "perf/steps_per_second": steps}
            assert len(images_in_mlflow(tracker)) == 6
            failures = tracker.errors
            tracker.__exit__(None, None, None)
            assert status_in_mlflow(tracker) == "FINISHED"
    assert failures >= 3
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert 2 <= len(warnings) <= 4  # one for each time the server went away, however many attempts failed


def test_server_that_never_answers_delays_the_end_by_two_seconds(tmp_path: Path):
    program = (
        "import sys, pathlib, time, socket\n"
        "from trainer.core import errors; from trainer.tracking.mlflow import MLflow\n"
        "from trainer.tracking.journal import Journal; from trainer.tracking.mlflow_store import import_mlflow\n"
        "folder = pathlib.Path(sys.argv[1]); journal = Journal(folder); import_mlflow()\n"
        "listener = socket.create_server(('127.0.0.1', 0)); uri = f'http://127.0.0.1:{listener.getsockname()[1]}'\n"
        "begin = time.monotonic()\n"
        "try:\n"
        "    with MLflow(uri=uri).open(journal, folder, name='', params={}, tags={}):\n"
        "        journal.log_metrics(1, {'train/loss': 1.0}); raise errors.Interrupted(15)\n"
        "finally:\n"
        "    print(time.monotonic() - begin)\n"
    )
    begin = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert "Interrupted" in result.stderr and "does not answer" in result.stderr
    assert 1.9 < float(result.stdout) < 4
    assert time.monotonic() - begin < 30
    assert json.loads((tmp_path / "tracking.json").read_text())["status"] == "KILLED"


@pytest.mark.slow
def test_eight_processes_that_create_one_database_all_finish(tmp_path: Path):
    program = (
        "import os, pathlib, sys\n"
        "from trainer.tracking.mlflow import MLflow; from trainer.tracking.journal import Journal\n"
        "from trainer.tracking.mlflow_store import import_mlflow; import_mlflow()\n"
        "for member in range(8):\n"
        "    if os.fork() == 0: break\n"
        "else:\n"
        "    sys.exit(sum(os.waitstatus_to_exitcode(os.wait()[1]) != 0 for _ in range(8)))\n"
        "out = pathlib.Path(sys.argv[1]); folder = out / str(member); folder.mkdir(); journal = Journal(folder)\n"
        "options = dict(name=str(member), params={'member': str(member)}, tags={'trainer.folder_id': str(member)})\n"
        "with MLflow().open(journal, out, **options) as tracker:\n"
        "    for step in range(1, 501):\n"
        "        journal.log_metrics(step, {'train/loss': 1 / step, 'train/lr': 1e-3, 'val/loss': 2.0})\n"
        "    assert tracker.flush(120)\n"
        "assert tracker.errors == 0, tracker.errors\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        finished = "SELECT count(*), count(DISTINCT name) FROM runs WHERE status = 'FINISHED'"
        assert database.execute(finished).fetchone() == (8, 8)
        assert database.execute("SELECT count(*) FROM metrics").fetchone() == (8 * 500 * 3,)
        assert database.execute("SELECT count(*) FROM experiments WHERE name = 'trainer'").fetchone() == (1,)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(files.PARTIAL_PREFIX)]


@pytest.mark.slow
def test_process_killed_while_creating_the_database_leaves_none(tmp_path: Path):
    program = (
        "import sys; from trainer.tracking.mlflow_store import connect, import_mlflow\n"
        "import_mlflow(); print(flush=True); connect(sys.argv[1], 'trainer')"
    )
    command = [sys.executable, "-c", program, f"sqlite:///{tmp_path}/mlflow.db"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    pattern, deadline = f"{files.PARTIAL_PREFIX}*mlflow.db", time.monotonic() + TIMEOUT
    while not any(path.stat().st_size > 100_000 for path in tmp_path.glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(tmp_path.glob(pattern)) and not (tmp_path / "mlflow.db").exists()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "mlflow.db").exists() and not list(tmp_path.glob(pattern))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out mistyped", "--out mistyped: there is no such folder; type .*"),
        ("--out .", r"--out \.: there are no runs in MLflow yet \(no file .*/mlflow.db\); type .*"),
        ("--uri sqlite:///mistyped.db", "--uri sqlite:///mistyped.db: there are no runs .*mistyped.db.*"),
        ("--out runs --experiment mistyped", "there is no experiment mistyped, only Default, trainer; type .*"),
    ],
)
def test_ui_command_refuses_what_has_no_runs_and_creates_nothing(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    if "--out runs" in arguments:
        mlflow_store.connect(mlflow_store.resolve_uri(None, tmp_path / "runs"), "trainer")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=f"ui: .*{message}"):
        ui.main(arguments.split())
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_ui_command_prints_a_link_to_the_runs_and_ends_its_server(tmp_path: Path):
    mlflow_store.connect(mlflow_store.resolve_uri(None, tmp_path), "trainer")
    occupied = socket.create_server(("127.0.0.1", 0))
    first = occupied.getsockname()[1]
    command = [sys.executable, "-m", "trainer", "ui", "--out", str(tmp_path), "--port", str(first)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    address, _, page = line.removeprefix("MLflow UI: ").partition("/#/")
    assert address.startswith("http://127.0.0.1:") and int(address.rpartition(":")[2]) > first
    experiment = page.split("/")[1]
    assert page.startswith(f"experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=trainer")
    with urllib.request.urlopen(f"{address}/api/2.0/mlflow/experiments/get?experiment_id={experiment}") as answer:
        assert json.load(answer)["experiment"]["name"] == "trainer"
    with urllib.request.urlopen(address) as answer:
        assert b"<html" in answer.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=2)
