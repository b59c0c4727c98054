"""The journal, its sink MLflow, and what is drawn from it: with real databases, servers, signals and processes."""

from __future__ import annotations

import contextlib
import csv
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

from trainer.core import errors, files
from trainer.tracking import MLflow, NoTracking, Sink, curves, open_sink, ui, view
from trainer.tracking.journal import Journal, read
from trainer.training import provenance

ROOT = Path(__file__).resolve().parents[1]
FOREVER = 120  # seconds: far above what any wait here takes, on a machine shared with others


# The journal


def test_a_journal_gives_back_what_was_written(tmp_path):
    with Journal(tmp_path) as journal:
        journal.event("attempt", number=1, device="cpu", loss=float("nan"), folder=Path("a/b"))
        journal.metrics(1, {"train/loss": 0.1, "train/lr": 1e-4})
        journal.metrics(2, {"train/loss": float("nan"), "train/lr": float("inf"), "train/grad_norm": float("-inf")})
        journal.picture(2, "samples/0", "pictures/step-00000002/0.png", "a \ud800 house\n\u2028 ü")
        attempt, first, second, picture = journal.records()
    assert attempt["kind"] == "attempt" and attempt["loss"] == "NaN" and attempt["folder"] == "a/b"
    assert first["step"] == 1 and first["values"] == {"train/loss": 0.1, "train/lr": 1e-4}
    assert repr(second["values"]) == "{'train/loss': nan, 'train/lr': inf, 'train/grad_norm': -inf}"
    assert (
        picture["key"] == "samples/0"
        and picture["path"] == "pictures/step-00000002/0.png"
        and "house\n" in picture["caption"]
    )
    # Other tools read it too: strict JSON, a line a record.
    lines = (tmp_path / "journal.jsonl").read_text().split("\n")
    assert (
        all(json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in lines[:-1]) and lines[-1] == ""
    )


def test_steps_walked_again_after_a_resume_are_not_journaled_twice(tmp_path):
    with Journal(tmp_path) as journal:
        for step in range(1, 11):
            journal.metrics(step, {"train/loss": step / 10})
        journal.picture(10, "samples/0", "0.png")
    with Journal(tmp_path) as journal:
        for step in range(6, 16):
            journal.metrics(step, {"train/loss": step / 10})
            if step == 10:
                journal.metrics(step, {"train/loss": 99.0, "val/loss": 1.0})  # the kill came between the two
                journal.picture(step, "samples/0", "0.png")
                journal.picture(step, "samples/1", "1.png")
        assert journal.counts == {"metrics": 16, "picture": 2}
    metrics = curves.series(tmp_path)
    assert list(metrics["train/loss"][0]) == list(range(1, 16))
    assert list(metrics["train/loss"][1]) == [step / 10 for step in range(1, 16)]
    assert list(metrics["val/loss"][0]) == [10]


@pytest.mark.parametrize(
    "torn", [b'{"time":1.5,"kind":"metr', b"\0\0\0\0", b'{"time":1.5,"kind":"event"}', b"12", b"x" * 200_000]
)
def test_a_line_torn_by_a_kill_spoils_nothing_written_before_or_after(tmp_path, torn):
    with Journal(tmp_path) as journal:
        journal.metrics(1, {"train/loss": 1.0})
        path = journal.path
    whole = path.stat().st_size
    with open(path, "ab") as file:
        file.write(torn)
    assert [offset for offset, _ in read(path)] == [whole]
    with Journal(tmp_path) as journal:
        journal.metrics(2, {"train/loss": 2.0})
    assert list(curves.series(tmp_path)["train/loss"][0]) == [1, 2]
    assert path.read_bytes().count(b"\n") == (3 if torn.endswith(b"}") else 2)


def test_a_writer_killed_at_any_moment_leaves_a_journal_that_goes_on(tmp_path):
    program = (
        "import sys, pathlib; from trainer.tracking.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1])); print(flush=True)\n"
        "for step in range(1, 10**9): journal.metrics(step, {'train/loss': step / 3, 'train/lr': 1e-4})"
    )
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.03)
        process.kill()
        process.wait()
    steps = list(curves.series(tmp_path)["train/loss"][0])
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 100


def test_a_full_disk_delays_the_journal_and_does_not_stop_training(tmp_path):
    program = (
        "import os, pathlib, resource, sys; from trainer.tracking.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1])); limit = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))\n"
        "for step in range(1, 50): journal.metrics(step, {'train/loss': step})\n"
        "assert journal.path.stat().st_size == 500\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, limit)\n"
        "journal.metrics(50, {'train/loss': 50})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))\n"
        "journal.metrics(51, {'train/loss': 51})\n"
        "journal.close()"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.count("File too large. What happens is kept in memory") == 2
    assert (
        "errors.StorageError" in result.stderr and "Raise the limit" in result.stderr
    )  # never lifted: said at the end
    assert list(curves.series(tmp_path)["train/loss"][0]) == list(range(1, 51))


def test_an_unwritable_folder_is_said_to_be_one(tmp_path):
    with pytest.raises(errors.StorageError, match=r"Could not open .*journal\.jsonl"):
        Journal(tmp_path / "missing")


def test_a_line_of_the_journal_costs_far_less_than_a_step(tmp_path):
    values = {f"train/{number}": number / 7 for number in range(10)}
    with Journal(tmp_path) as journal:
        seconds = []
        for block in range(20):
            begin = time.perf_counter()
            for step in range(100):
                journal.metrics(block * 100 + step, values)
            seconds.append((time.perf_counter() - begin) / 100)
    assert min(seconds) < 100e-6


# The settings


def test_without_tracking_mlflow_is_never_imported(tmp_path):
    program = (
        "import sys, pathlib; from trainer.tracking import NoTracking, open_sink; from trainer.tracking.journal import Journal\n"
        "folder = pathlib.Path(sys.argv[1]); journal = Journal(folder)\n"
        "with open_sink(NoTracking(), folder, folder, journal, name='', params={}, tags={}) as sink:\n"
        "    journal.metrics(1, {'train/loss': 1.0}); assert sink.flush() and sink.run_id is None and sink.errors == 0\n"
        "assert not {'mlflow', 'trainer.tracking.sink', 'matplotlib', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True)
    assert os.listdir(tmp_path) == ["journal.jsonl"]


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///a.db",
        "sqlite:////tmp/a.db?timeout=3",
        "http://host:5000",
        "postgresql+psycopg2://me@host/db",
        "databricks",
        None,
    ],
)
def test_addresses_of_databases_and_servers_are_taken(uri):
    assert MLflow(uri=uri).uri == uri


@pytest.mark.parametrize(
    "uri", ["mlruns", "./mlruns", "file:///tmp/mlruns", "sqlite://", "sqlite:///:memory:", "http://", "http://[x", ""]
)
def test_addresses_that_mlflow_could_not_use_are_refused_with_what_to_type(uri):
    with pytest.raises(
        errors.UsageError, match=r"type tracking\.uri=sqlite:///path/to/mlflow\.db or tracking\.uri=http"
    ):
        MLflow(uri=uri)


@pytest.mark.parametrize(
    "uri",
    ["https://me:geheim@host", "https://geheim@host", "postgresql://me:geheim@host/db", "mysql://h/d?password=geheim"],
)
def test_an_address_with_a_password_is_refused_without_repeating_it(uri):
    with pytest.raises(errors.UsageError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        MLflow(uri=uri)
    assert "geheim" not in str(refusal.value)


def test_a_relative_database_stays_where_it_was_meant_when_the_working_directory_changes(tmp_path, monkeypatch):
    from trainer.tracking.sink import address

    monkeypatch.chdir(tmp_path)
    assert address("sqlite:///some/my.db?timeout=3", Path("runs")) == f"sqlite:///{tmp_path}/some/my.db?timeout=3"
    assert address(None, Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert address("http://host:5000", Path("runs")) == "http://host:5000"


# MLflow


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder of runs whose name has all that URIs trip over; its database takes seconds to make, so it is shared."""
    return tmp_path_factory.mktemp("out") / "my runs #1 50%?"


@pytest.fixture
def folder(out, request):
    path = out / request.node.name
    path.mkdir(parents=True)
    return path


def shown(folder: Path, journal: Journal, uri: str | None = None, **more) -> Sink:
    """A sink for the run in `folder`, in an experiment of its own."""
    settings = MLflow(experiment=folder.name, uri=uri)
    told = {"name": "a run", "params": {"optimizer.lr": "0.001"}, "tags": {"trainer.folder_id": folder.name}}
    return open_sink(settings, folder.parent, folder, journal, **(told | more))


def client_of(sink: Sink):
    import mlflow

    return mlflow.MlflowClient(sink.uri)


def points(sink: Sink) -> dict[str, list[int]]:
    """The steps of each metric as MLflow has them, doubled ones twice."""
    client = client_of(sink)
    keys = client.get_run(sink.run_id).data.metrics
    return {key: sorted(point.step for point in client.get_metric_history(sink.run_id, key)) for key in keys}


def slider(sink: Sink) -> list[str]:
    """What the step slider of MLflow's UI finds: "key step", each as a full and a small picture."""
    names = [
        file.path.removeprefix("images/").split("+") for file in client_of(sink).list_artifacts(sink.run_id, "images")
    ]
    return sorted(f"{name[0].replace('~', '/')} {name[2]} {name[-1].rpartition('.')[2]}" for name in names)


def train(journal: Journal, *steps: int) -> None:
    for step in steps:
        journal.metrics(step, {"train/loss": 1 / step, "perf/steps_per_second": float("nan")})


def paint(folder: Path, journal: Journal, step: int) -> None:
    import numpy
    from matplotlib.image import imsave

    (folder / "pictures").mkdir(exist_ok=True)
    imsave(folder / f"pictures/{step}.png", numpy.full((16, 16, 3), step % 256, dtype=numpy.uint8))
    journal.picture(step, "samples/make it night, [now]", f"pictures/{step}.png", "make it night")


def status(sink: Sink) -> str:
    return client_of(sink).get_run(sink.run_id).info.status


def test_mlflow_shows_all_of_a_run_and_how_it_ended(folder):
    from trainer.tracking.sink import is_complete

    params = {"optimizer.betas[0]": "0.9", "dataset.path": "x" * 7000, "name": "", "a//b": "1"}
    tags = {"trainer.folder_id": "an id with 'quotes'", "attempt.1.device": "cpu"}
    with Journal(folder) as journal:
        with shown(folder, journal, params=params, tags=tags, description="**hello**", parent="0" * 32) as sink:
            train(journal, *range(1, 1201))
            paint(folder, journal, 600)
            paint(folder, journal, 1200)
            assert sink.flush(FOREVER) and status(sink) == "RUNNING"
            train(journal, 1201)
        journal.event("finished")
    assert sink.errors == 0 and status(sink) == "FINISHED" and is_complete(folder)
    assert points(sink) == {"train/loss": list(range(1, 1202)), "perf/steps_per_second": list(range(1, 1202))}
    name = "samples/make it night_ _now_"
    assert slider(sink) == [f"{name} {step} {kind}" for step in (1200, 600) for kind in ("png", "webp")]
    run = client_of(sink).get_run(sink.run_id)
    assert run.info.run_name == "a run" and run.info.artifact_uri.startswith(str(folder.parent / "mlartifacts"))
    assert (
        run.data.params["optimizer.betas_0_"] == "0.9"
        and run.data.params["name"] == ""
        and run.data.params["a/b"] == "1"
    )
    assert run.data.params["dataset.path"].endswith("x... (7000 characters)")
    expected = {
        "attempt.1.device": "cpu",
        "mlflow.note.content": "**hello**",
        "mlflow.parentRunId": "0" * 32,
        "mlflow.loggedImages": "True",
    }
    assert expected.items() <= run.data.tags.items() and run.data.tags["trainer.host"] == socket.gethostname()
    assert sqlite3.connect(folder.parent / "mlflow.db").execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_next_attempt_sends_only_what_mlflow_lacks(folder, caplog):
    from trainer.tracking.sink import is_complete

    with Journal(folder) as journal:
        with pytest.raises(errors.Interrupted), shown(folder, journal) as first:
            train(journal, *range(1, 31))
            paint(folder, journal, 30)
            assert first.flush(FOREVER)
            raise errors.Interrupted(signal.SIGTERM)
        assert status(first) == "KILLED"
        train(journal, *range(31, 41))  # journaled, never sent: as after a kill
        paint(folder, journal, 40)
    assert not is_complete(folder)
    # Nor does the next attempt know what MLflow called the run: killed between making it and taking a note.
    (folder / "tracking.json").unlink()
    with Journal(folder) as journal:
        with pytest.raises(ZeroDivisionError), shown(folder, journal, params={"optimizer.lr": "0.002"}) as second:
            assert second.flush(FOREVER) and status(second) == "RUNNING"
            train(journal, *range(25, 51))
            paint(folder, journal, 40)
            paint(folder, journal, 50)
            second.flush(FOREVER)
            raise ZeroDivisionError
        assert second.run_id == first.run_id and status(second) == "FAILED"
        assert points(second)["train/loss"] == list(range(1, 51))
        assert [name.split()[-2:] for name in slider(second)] == [
            [step, kind] for step in ("30", "40", "50") for kind in ("png", "webp")
        ]
        assert "MLflow keeps the first values of optimizer.lr" in caplog.text
        # A run deleted in the UI comes back as another one, whole.
        client_of(second).delete_run(first.run_id)
        with shown(folder, journal) as third:
            pass
    assert (
        third.run_id != first.run_id and points(third)["train/loss"] == list(range(1, 51)) and len(slider(third)) == 6
    )


def test_a_picture_of_which_only_half_arrived_is_there_once_after_another_try(folder):
    with Journal(folder) as journal, shown(folder, journal) as sink:
        paint(folder, journal, 1)
        sink.flush(FOREVER)
    images = folder.parent / "mlartifacts" / sink.run_id / "artifacts" / "images"
    for small in images.glob("*.webp"):
        small.unlink()
    (folder / "pictures/2.png").write_bytes(b"no picture")
    with Journal(folder) as journal, shown(folder, journal) as sink:
        journal.picture(2, "samples/0", "pictures/2.png")
        journal.picture(2, "samples/1", "pictures/gone.png")
        paint(folder, journal, 3)
        assert sink.flush(FOREVER)
    assert [name.split()[-2:] for name in slider(sink)] == [[step, kind] for step in "13" for kind in ("png", "webp")]


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (None, "FINISHED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(70), "FAILED"),
        (SystemExit(143), "KILLED"),
        (errors.NonFiniteError("NaN"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (errors.Interrupted(2), "KILLED"),
    ],
)
def test_every_ending_has_its_status(error, word):
    from trainer.tracking.sink import status_of

    assert status_of(error) == word


def test_runs_whose_process_died_are_ended_by_the_next_one_and_living_ones_left_alone(folder):
    import mlflow

    from trainer.tracking.sink import address, connect

    uri = address(None, folder.parent)
    client, experiment = connect(uri, folder.name)

    def running(name: str, **tags: str) -> str:
        (folder / name).mkdir()
        (folder / name / "lock").touch()
        own = {"trainer.folder": str(folder / name), "trainer.host": socket.gethostname()}
        return client.create_run(
            experiment, tags=own | {key.replace("_", "."): value for key, value in tags.items()}
        ).info.run_id

    dead, alive, away, foreign = (
        running("dead"),
        running("alive"),
        running("away", trainer_host="elsewhere"),
        running("gone"),
    )
    unseen = running("unseen")  # ended well, but MLflow did not answer any more
    files.write_json(folder / "unseen" / "tracking.json", {"run_id": unseen, "status": "FINISHED"})
    (folder / "gone" / "lock").unlink()
    with files.Lock(folder / "alive" / "lock"), Journal(folder) as journal, shown(folder, journal) as sink:
        sink.flush(FOREVER)
    found = {
        name: mlflow.MlflowClient(uri).get_run(run).info.status
        for name, run in locals().items()
        if isinstance(run, str) and len(run) == 32
    }
    assert found == {
        "dead": "KILLED",
        "alive": "RUNNING",
        "away": "RUNNING",
        "foreign": "RUNNING",
        "unseen": "FINISHED",
    }


def test_a_locked_database_holds_up_nobody_and_loses_nothing(folder):
    with Journal(folder) as journal, shown(folder, journal) as sink:
        train(journal, 1)
        assert sink.flush(FOREVER)
        with contextlib.closing(sqlite3.connect(folder.parent / "mlflow.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            begin = time.perf_counter()
            train(journal, *range(2, 102))
            assert time.perf_counter() - begin < 0.5
            assert not sink.flush(1)
            other.execute("ROLLBACK")
        assert sink.flush(FOREVER)
    assert points(sink)["train/loss"] == list(range(1, 102))


def test_a_database_moved_with_its_runs_keeps_its_pictures(folder, tmp_path):
    from mlflow.tracking._tracking_service import utils as artifact_repositories

    # A small copy, so that the shared one stays where it is.
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    with (
        contextlib.closing(sqlite3.connect(folder.parent / "mlflow.db")) as shared,
        contextlib.closing(sqlite3.connect(here / "mlflow.db")) as copy,
    ):
        shared.backup(copy)
    (here / "run").mkdir()
    with Journal(here / "run") as journal, shown(here / "run", journal) as before:
        paint(here / "run", journal, 1)
    here.rename(there)
    artifact_repositories._artifact_repos_cache.clear()  # another process would not know the old place
    with Journal(there / "run") as journal, shown(there / "run", journal) as after:
        paint(there / "run", journal, 2)
    assert after.run_id == before.run_id and len(slider(after)) == 4 and not here.exists()


class Proxy:
    """A way to a server that can lose answers on their way back; nothing else is touched."""

    def __init__(self, port: int):
        self.port, self.lose, self.lost = port, False, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._pass, args=self.listener.accept()[:1], daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self.port)) as server:
            threading.Thread(target=self._copy, args=(client, server), daemon=True).start()
            while answer := server.recv(65536):
                if self.lose:
                    self.lost += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(answer)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)


@contextlib.contextmanager
def server(out: Path, port: int):
    base = f"http://127.0.0.1:{port}"
    with (
        open(out / "server.log", "ab") as output,
        ui.serving(f"sqlite:///{out}/mlflow.db", base, out, output) as process,
    ):
        deadline = time.monotonic() + FOREVER
        while not ui._answers(base):
            assert process.poll() is None and time.monotonic() < deadline, (out / "server.log").read_text()
            time.sleep(0.1)
        yield process


@pytest.mark.slow  # the server is started twice
def test_a_server_down_at_the_start_gone_in_the_middle_and_back_lacks_no_point_and_doubles_none(
    tmp_path, monkeypatch, caplog
):
    from trainer.tracking import sink as sinks

    caplog.set_level(logging.INFO, "trainer.tracking")
    monkeypatch.setattr(sinks, "PERIOD", 0.2)
    port = ui.free_port(5600)
    proxy = Proxy(port)
    folder = tmp_path / "run"
    folder.mkdir()
    with Journal(folder) as journal, shown(folder, journal, proxy.url) as sink:
        begin = time.perf_counter()
        train(journal, *range(1, 51))
        paint(folder, journal, 50)
        assert time.perf_counter() - begin < 3 and not sink.flush(3) and sink.run_id is None  # down: training went on
        with server(tmp_path, port) as process:
            assert sink.flush(FOREVER) and status(sink) == "RUNNING"
            proxy.lose = True  # the server takes what is sent, and nobody hears that it did
            train(journal, *range(51, 1551))
            paint(folder, journal, 100)
            deadline = time.monotonic() + FOREVER
            while proxy.lost < 3 and time.monotonic() < deadline:
                time.sleep(0.1)
            proxy.lose = False
            train(journal, *range(1551, 1601))
            assert sink.flush(FOREVER)
            os.killpg(process.pid, signal.SIGKILL)
        train(journal, *range(1601, 1701))
        assert not sink.flush(1)
        with server(tmp_path, port):
            paint(folder, journal, 1700)
            assert sink.flush(FOREVER)
            assert points(sink) == {key: list(range(1, 1701)) for key in ("train/loss", "perf/steps_per_second")}
            assert len(slider(sink)) == 6
            errors_seen = sink.errors
            sink.__exit__(None, None, None)
            assert status(sink) == "FINISHED"
    assert errors_seen >= 3
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert 2 <= len(said) <= 4  # once each time it went away, however often it was tried


def test_a_server_that_never_answers_keeps_neither_training_nor_its_end_waiting(tmp_path):
    program = (
        "import sys, pathlib, time, socket; from trainer import errors, tracking; from trainer.tracking import sink\n"
        "from trainer.tracking.journal import Journal\n"
        "folder = pathlib.Path(sys.argv[1]); journal = Journal(folder); sink._mlflow()\n"
        "listener = socket.create_server(('127.0.0.1', 0)); uri = f'http://127.0.0.1:{listener.getsockname()[1]}'\n"
        "begin = time.monotonic()\n"
        "try:\n"
        "    with tracking.open_sink(tracking.MLflow(uri=uri), folder, folder, journal, name='', params={}, tags={}):\n"
        "        journal.metrics(1, {'train/loss': 1.0}); raise errors.Interrupted(15)\n"
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
def test_eight_processes_at_once_on_a_fresh_store_all_finish_and_lose_no_row(tmp_path):
    program = (
        "import os, pathlib, sys; from trainer import tracking; from trainer.tracking import sink; from trainer.tracking.journal import Journal\n"
        "sink._mlflow()\n"
        "for member in range(8):\n"
        "    if os.fork() == 0: break\n"
        "else:\n"
        "    sys.exit(sum(os.waitstatus_to_exitcode(os.wait()[1]) != 0 for _ in range(8)))\n"
        "out = pathlib.Path(sys.argv[1]); folder = out / str(member); folder.mkdir(); journal = Journal(folder)\n"
        "told = dict(name=str(member), params={'member': str(member)}, tags={'trainer.folder_id': str(member)})\n"
        "with tracking.open_sink(tracking.MLflow(), out, folder, journal, **told) as shown:\n"
        "    for step in range(1, 501): journal.metrics(step, {'train/loss': 1 / step, 'train/lr': 1e-3, 'val/loss': 2.0})\n"
        "    assert shown.flush(120)\n"
        "assert shown.errors == 0, shown.errors\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=FOREVER
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute(
            "SELECT count(*), count(DISTINCT name) FROM runs WHERE status = 'FINISHED'"
        ).fetchone() == (8, 8)
        assert database.execute("SELECT count(*) FROM metrics").fetchone() == (8 * 500 * 3,)
        assert database.execute("SELECT count(*) FROM experiments WHERE name = 'trainer'").fetchone() == (1,)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(files.PARTIAL)]


@pytest.mark.slow
def test_a_process_killed_while_it_makes_the_store_does_not_break_it(tmp_path):
    program = "import sys; from trainer.tracking import sink; sink._mlflow(); print(flush=True); sink.connect(sys.argv[1], 'trainer')"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    process = subprocess.Popen([sys.executable, "-c", program, uri], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    deadline = time.monotonic() + FOREVER
    while (
        not [path for path in tmp_path.glob(f"{files.PARTIAL}*") if path.stat().st_size > 100_000]
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(tmp_path.glob(f"{files.PARTIAL}*")) and not (tmp_path / "mlflow.db").exists()
    subprocess.run([sys.executable, "-c", program, uri], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "mlflow.db").exists() and not list(tmp_path.glob(f"{files.PARTIAL}*"))


# What is left beside the run


def test_curves_table_and_summary_are_made_of_nothing_too(tmp_path):
    for path in (
        curves.draw_curves(tmp_path),
        curves.write_metrics_csv(tmp_path),
        curves.write_summary(tmp_path, {"status": "failed"}),
    ):
        assert path.exists()
    assert (tmp_path / "metrics.csv").read_text() == "step\n"
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


def test_curves_table_and_summary_tell_what_the_journal_has(tmp_path):
    with Journal(tmp_path) as journal:
        journal.event("attempt", number=1)
        for step in range(1, 101):
            values = {"train/loss": 30 / step, "train/lr": 1e-3, "train/grad_norm": float("inf") if step == 7 else 1.0}
            journal.metrics(
                step, values | {"perf/steps_per_second": 9.5, "system/memory_gib": 1.0, "system/device_memory_gib": 2.0}
            )
            if step % 25 == 0:
                journal.metrics(step, {"val/loss": abs(step - 75) + 0.5, "val/psnr": step / 4})
    table = list(csv.DictReader(curves.write_metrics_csv(tmp_path).read_text().splitlines()))
    assert list(table[0]) == ["step", *sorted(list(table[0])[1:])] and [row["step"] for row in table] == [
        str(step) for step in range(1, 101)
    ]
    assert table[6]["train/grad_norm"] == "inf" and table[6]["val/loss"] == "" and float(table[74]["val/loss"]) == 0.5
    summary = json.loads(curves.write_summary(tmp_path, {"status": "finished", "steps": 100}).read_text())
    assert summary["best"]["val/loss"] == {"value": 0.5, "step": 75} and summary["best"]["val/psnr"] == {
        "value": 25.0,
        "step": 100,
    }
    assert summary["final"]["train/loss"] == 0.3 and summary["attempts"] == 1 and summary["status"] == "finished"
    before = set(sys.modules)
    picture = curves.draw_curves(tmp_path, "a title").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_smoothing_neither_lags_behind_nor_shortens():
    falling = [1000.0 - step for step in range(1000)]
    assert curves.smoothed([]) == [] and curves.smoothed([3.0]) == [3.0]
    assert curves.smoothed(falling)[25:-25] == falling[25:-25] and len(curves.smoothed(falling)) == 1000


# The UI


def test_an_experiment_has_the_view_that_our_link_opens_though_it_was_made_without(tmp_path):
    from trainer.tracking.sink import address, connect

    uri = address(None, tmp_path)
    client, experiment = connect(uri, "trainer")
    key = f"mlflow.sharedViewState.{view.RUNS}"
    made = client.get_experiment(experiment).tags[key]
    client.set_experiment_tag(experiment, key, "{}")
    connect(uri, "trainer")
    assert client.get_experiment(experiment).tags[key] == made == view.runs()
    assert json.loads(made)["selectedColumns"][:2] == ["metrics.`val/loss`", "metrics.`val/psnr`"]


def test_the_view_of_children_filters_sorts_and_shows_what_varies_with_pictures_free_of_settings():
    state = json.loads(view.children("an id", ["optimizer.lr"], ["samples/1_night"], 40))
    assert state["searchFilter"] == "tags.mlflow.parentRunId = 'an id'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val/loss`", True)
    assert (
        "params.`optimizer.lr`" in state["selectedColumns"] and "params.`method.rank`" not in state["selectedColumns"]
    )
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert all(chart["metricSectionId"] in sections for chart in state["compareRunCharts"])
    (picture,) = (chart for chart in state["compareRunCharts"] if chart["type"] == "IMAGE")
    assert (picture["imageKeys"], picture["step"], picture["showRunParams"]) == (["samples/1_night"], 40, False)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ([], ""),
        (["optimizer.lr=1e-4", "method.rank=4", "dataset=pairs"], "lr=1e-4 rank=4 dataset=pairs"),
        (["model.path=a/b.c", "dataset.path=d", "seed=1"], "model.path=a/b.c dataset.path=d seed=1"),
        (["dataset.edits=[night,outline]", "~ema"], "edits=[night,outline] ~ema"),
    ],
)
def test_names_of_runs_are_short_and_tell_settings_apart(settings, name):
    assert provenance.short(settings) == name


@pytest.mark.slow
def test_the_ui_prints_a_link_to_the_runs_and_leaves_nothing_behind(out):
    taken = socket.create_server(("127.0.0.1", 0))
    first = taken.getsockname()[1]
    command = [sys.executable, "-m", "trainer.tracking.ui", "--out", str(out), "--port", str(first)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    base, _, page = line.removeprefix("MLflow UI: ").partition("/#/")
    assert base.startswith("http://127.0.0.1:") and int(base.rpartition(":")[2]) > first
    experiment = page.split("/")[1]
    assert page.startswith(f"experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=trainer")
    with urllib.request.urlopen(f"{base}/api/2.0/mlflow/experiments/get?experiment_id={experiment}") as answer:
        assert json.load(answer)["experiment"]["name"] == "trainer"
    with urllib.request.urlopen(base) as answer:
        assert b"<html" in answer.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(base, timeout=2)


def test_no_tracking_is_an_option_like_any():
    assert isinstance(open_sink(NoTracking(), Path(), Path(), None, name="", params={}, tags={}), Sink)
