"""Faults of the surroundings: locked folders, MLflow, hostile model files, secrets, file permissions and clocks."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path

import psutil
from fault_table import FORWARD, GIB, assert_continues, fault, stop_run
from program import (
    Harness,
    at_call,
    copy_folder,
    fingerprint,
    records,
    run_all,
    scale_timeout,
    single_run,
    snapshot,
)


@fault("F25", "a second run on the folder; a dead owner", 2, [0])
def two_runs(harness: Harness, out: Path, trial: int) -> None:
    settings = ["hardware.workers=1"]
    paused = out / "paused"

    def pause() -> None:
        paused.touch()
        while paused.exists():
            time.sleep(0.01)

    first = harness.start(out, *settings, setup=at_call(FORWARD, 3, pause))
    deadline = time.monotonic() + scale_timeout(60)
    while not paused.exists():
        assert time.monotonic() < deadline, first.output.read_text()
        time.sleep(0.01)
    if trial == 0:
        second = harness.run(out, *settings)
        assert second.code == 75 and f"process {first.pid}" in second.output and second.seconds < scale_timeout(2)
        paused.unlink()
        assert first.wait().code == 0
        harness.assert_equals_reference(single_run(out), *settings)
    else:
        first.signal(signal.SIGKILL)
        first.wait()
        assert_continues(harness, out, *settings)


@fault("F26", "eight runs at once with a new MLflow database", 1, [])
def eight_runs(harness: Harness, out: Path, trial: int) -> None:
    from trainer.tracking.mlflow_store import import_mlflow

    harness.reference()
    import_mlflow()
    runs = [harness.start(out, "tracking=mlflow", f"seed={seed}") for seed in range(1, 9)]
    for seed, run in enumerate(runs, 1):
        result = run.wait()
        assert result.code == 0, result
        if "does not answer" in result.output:
            # The machine is so slow that this run gave up while another one created the database.
            assert harness.run(out, "tracking=mlflow", f"seed={seed}").code == 0
    with contextlib.closing(sqlite3.connect(out / "mlflow.db")) as database:
        query = "SELECT count(*), count(DISTINCT name) FROM runs WHERE status = 'FINISHED'"
        assert database.execute(query).fetchone() == (8, 8)
        assert database.execute("SELECT count(*) FROM experiments WHERE name = 'trainer'").fetchone() == (1,)
    folders = [path.parent for path in out.glob("*/run.json")]
    assert points_in_database(out) == Counter(point for folder in folders for point in points_in_journal(folder))


def points_in_database(out: Path) -> Counter[tuple[str, int]]:
    """Returns how often the MLflow database in `out` contains each (metric, step)."""
    with contextlib.closing(sqlite3.connect(out / "mlflow.db")) as database:
        return Counter(database.execute("SELECT key, step FROM metrics"))


def points_in_journal(folder: Path) -> list[tuple[str, int]]:
    return [(name, record["step"]) for record in records(folder, "metrics") for name in record["values"]]


@fault("F27", "MLflow is down at the start, stops in the middle, or is locked; then it is available again", 3, [])
def mlflow_unavailable(harness: Harness, out: Path, trial: int) -> None:
    from mlflow_helpers import server

    from trainer.tracking import ui
    from trainer.tracking.mlflow_store import import_mlflow

    import_mlflow()
    port = ui.free_port(5700)
    settings = ["tracking=mlflow"] + ([] if trial == 2 else [f"tracking.uri=http://127.0.0.1:{port}"])
    with contextlib.ExitStack() as stack:
        stop_server = None
        if trial == 1:
            process = stack.enter_context(server(out, port))
            stop_server = at_call(FORWARD, 3, lambda: os.killpg(process.pid, signal.SIGKILL))
        if trial == 2:
            # Another run creates the database, which is then locked.
            harness.finish(out, *settings, "seed=9")
            database = stack.enter_context(contextlib.closing(sqlite3.connect(out / "mlflow.db", isolation_level=None)))
            database.execute("BEGIN EXCLUSIVE")
        result = harness.run(out, *settings, setup=stop_server)
    assert result.code == 0 and "Traceback" not in result.output, result
    (folder,) = (
        path.parent for path in out.glob("*/run.json") if json.loads(path.read_text())["settings"]["seed"] == 0
    )
    assert fingerprint(folder) == fingerprint(harness.reference())
    with server(out, port) if trial < 2 else contextlib.nullcontext():
        result = harness.run(out, *settings)
    assert result.code == 0 and "sending the rest of this run to the tracker" in result.output, result
    folders = [path.parent for path in out.glob("*/run.json")]
    assert points_in_database(out) == Counter(point for folder in folders for point in points_in_journal(folder))


@fault("F31", "model folders with code of their own", 2, [0])
def code_in_model(harness: Harness, out: Path, trial: int) -> None:
    model, executed = copy_folder(harness.folder / "model", out), out / "executed"
    for path in sorted(model.glob("*/*config.json")):
        (path.parent / "evil.py").write_text(f"open({str(executed)!r}, 'w')\nclass Evil: pass\n")
        config = json.loads(path.read_text())
        config |= {
            "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil"),
            "trust_remote_code": True,
        }
        if trial:
            config |= {"_class_name": "evil.Evil", "architectures": ["evil.Evil"], "tokenizer_class": "evil.Evil"}
        path.write_text(json.dumps(config))
    result = harness.run(out, f"model.path={model}", f"cache.path={out}/cache")
    assert result.code in (0, 64, 65) and "Traceback" not in result.output, result
    assert not executed.exists()


SECRET = "hf_" + "Q7" * 12


@fault("F32", "a token in the environment and in an exception; on the command line", 3, [0, 2])
def token(harness: Harness, out: Path, trial: int) -> None:
    if trial == 2:
        result = harness.run(out, f"name={SECRET}")
        assert result.code == 64 and list(out.iterdir()) == []
    else:

        def leak() -> None:
            raise RuntimeError(f"401 for https://somebody:{SECRET}@example.org and of-no-known-form")

        def set_variables() -> None:
            os.environ |= {"HF_TOKEN": SECRET, "SOMEBODYS_PASSWORD": "of-no-known-form"}

        settings = ["tracking=" + ("none", "mlflow")[trial], f"cache.path={out}/cache"]
        result = harness.run(out, *settings, setup=run_all(set_variables, at_call(FORWARD, 4, leak)))
        assert result.code == 1 and "401 for https://somebody:***@example.org and ***" in result.output, result
        assert harness.run(out, *settings, setup=set_variables).code == 0
    written = result.output.encode() + b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert SECRET.encode() not in written and b"of-no-known-form" not in written


def safetensors_header(text: str, length: int | None = None) -> bytes:
    """Returns the start of a safetensors file: the length of the header, and the header."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode()


INVALID_FILES = [
    safetensors_header("", 2**63 - 1),
    safetensors_header("{}", 2**40),
    safetensors_header('{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
    safetensors_header(
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    + bytes(12),
    safetensors_header('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    safetensors_header("[" * 100_000),
]


@fault("F33", "invalid safetensors: denoiser, VAE, text encoder, initial weights", 4 * len(INVALID_FILES), [2, 9])
def invalid_safetensors(harness: Harness, out: Path, trial: int) -> None:
    model = copy_folder(harness.folder / "model", out)
    component = ("transformer", "vae", "text_encoder", None)[trial % 4]
    settings = [f"model.path={model}", f"cache.path={out}/cache"]
    if component:
        (path,) = (model / component).glob("*.safetensors")
    else:
        path = out / "initial.safetensors"
        settings.append(f"method.init_from={path}")
    path.write_bytes(INVALID_FILES[trial // 4])

    def limit_memory() -> None:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + GIB // 2, resource.RLIM_INFINITY))

    result = harness.run(out, *settings, setup=limit_memory)
    assert result.code == 65 and str(path) in result.output and "Traceback" not in result.output, result


@fault("F34", "a clock that is set back, and files with misleading modification times", 1, [])
def clock_set_back(harness: Harness, out: Path, trial: int) -> None:
    folder = stop_run(harness, out, 5)
    for age, path in enumerate(sorted(folder.rglob("*"), reverse=True)):
        os.utime(path, (10**9 - age, 10**9 - age))

    def set_clock_back() -> None:
        now = time.time
        time.time = lambda: now() - 86_400

    assert harness.run(out, setup=set_clock_back).code == 0
    harness.assert_equals_reference(folder)


@fault("F34", "a folder that is a file; one without write access; one that was moved", 3, [1])
def wrong_folder(harness: Harness, out: Path, trial: int) -> None:
    if trial == 0:
        (out / "file").write_text("mine")
        result = harness.run(out, f"out={out}/file")
        assert result.code == 74 and "out=" in result.output and (out / "file").read_text() == "mine"
    elif trial == 1:
        out.chmod(0o555)
        result = harness.run(out, setup=drop_root_capabilities)
        assert result.code == 74 and "out=" in result.output and "Traceback" not in result.output
    else:
        folder = stop_run(harness, out, 4)
        moved = folder.rename(harness.new_folder() / "elsewhere")
        assert harness.run(out, f"resume={moved}").code == 0
        harness.assert_equals_reference(moved)
        assert list(out.iterdir()) == []


def drop_root_capabilities() -> None:
    """Takes from a root process the capability to write everywhere."""
    if os.geteuid() == 0:
        version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(version, none) == 0


@fault("F38", "a link in the place of one of the names that a run writes", 40, [0])
def link_in_run_folder(harness: Harness, out: Path, trial: int) -> None:
    finished = harness.reference()
    # The lock first: it is opened before everything else.
    names = sorted((path.relative_to(finished) for path in finished.rglob("*")), key=lambda name: name.name != "lock")
    folder = copy_folder(finished, out)
    # As if the run had been killed: the same command would continue, and write.
    (folder / "summary.json").rename(out / "summary.json")
    name = names[trial % len(names)]
    path, outside = folder / name, out / "outside"
    (path if path.exists() else out / "summary.json").rename(outside)
    path.symlink_to(outside)
    before = snapshot(outside)
    result = harness.run(out)
    assert result.code == 74 and f"{path} is a link to {outside}" in result.output, result
    assert snapshot(outside) == before


@fault("F38", "runs, a single run and the cache on another disk, behind links", 1, [])
def folders_behind_links(harness: Harness, out: Path, trial: int) -> None:
    for name in ("runs", "cache"):
        (out / "disk" / name).mkdir(parents=True)
        (out / name).symlink_to(out / "disk" / name)
    settings = [f"cache.path={out}/cache", f"out={out}/runs"]
    assert harness.run(out, *settings).code == 0
    folder = single_run(out / "runs")
    harness.assert_equals_reference(folder)
    assert list((out / "disk" / "cache").rglob("*.safetensors"))
    moved = folder.rename(out / "disk" / "moved")
    folder.symlink_to(moved)
    result = harness.run(out, *settings)
    assert result.code == 0 and "nothing to do" in result.output, result
