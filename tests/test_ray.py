"""Members of a sweep on a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="needs pip install 'trainer[ray]'")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ["evaluation.images=0", "dataset.pairs=8", "dataset.held_out=2", "tracking=none", "hydra.launcher.gpus=0"]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def sweep(cluster, out: Path, *arguments: str) -> subprocess.Popen[str]:
    launcher = ["hydra/launcher=ray", f"hydra.launcher.address={cluster.address}", f"out={out}"]
    command = [sys.executable, "-m", "trainer", "-m", *launcher, *SETTINGS, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def members(out: Path) -> list[dict]:
    (record,) = out.glob("sweeps/*/sweep.json")
    return json.loads(record.read_text())["members"]


def wait_for_training(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while sum('"checkpoint"' in path.read_text() for path in out.glob("*/journal.jsonl")) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)


def test_members_run_on_both_nodes_and_a_lost_node_is_told(cluster, tmp_path: Path):
    many = ("method.rank=2,4", "steps=300", "evaluation.every=300", "save.every=20")
    process = sweep(cluster, tmp_path, *many)
    wait_for_training(process, tmp_path, 2)
    cluster.remove_node(next(node for node in cluster.list_all_nodes() if not node.head), allow_graceful=False)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 1, text
    assert sorted(member["status"] for member in members(tmp_path)) == ["failed", "finished"], text
    process = sweep(cluster, tmp_path, *many)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert [member["status"] for member in members(tmp_path)] == ["finished"] * 2
    logs = [path.read_text() for path in tmp_path.glob("sweeps/*/*.log")]
    assert sum("continuing at step" in log for log in logs) == 1, logs


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_members_end_with_the_sweep_and_the_same_command_continues_them(number: int, cluster, tmp_path: Path):
    many = ("method.rank=2,4", "steps=300", "evaluation.every=300", "save.every=20")
    process = sweep(cluster, tmp_path, *many)
    wait_for_training(process, tmp_path, 2)
    process.send_signal(number)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == (-number if number == signal.SIGKILL else 130), text
    process = sweep(cluster, tmp_path, *many)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and [member["status"] for member in members(tmp_path)] == ["finished"] * 2, text
    logs = [path.read_text() for path in tmp_path.glob("sweeps/*/*.log")]
    assert sum("continuing at step" in log for log in logs) == 2, logs


def test_a_missing_cluster_is_told(tmp_path: Path):
    command = [sys.executable, "-m", "trainer", "-m", "hydra/launcher=ray", "hydra.launcher.address=127.0.0.1:1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "method.rank=2,4", f"out={tmp_path}"], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 64 and "there is no Ray cluster" in done.stderr, done.stderr
