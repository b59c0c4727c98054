"""Members of a sweep as jobs: with submitit's local executor, and with a Slurm cluster of one node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import slurm_cluster

from trainer.core.errors import UsageError
from trainer.sweep.executors.slurm import Job, SlurmExecutor

ROOT = Path(__file__).resolve().parents[1]
SAVES = (
    "import signal, sys, time\n"
    "def stop(number, frame): print('saved', flush=True); sys.exit(128 + number)\n"
    "signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)\n"
    "print('trains', flush=True); time.sleep(120)\n"
)


def wait(until: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def start(executor: SlurmExecutor, log: Path, *arguments: str) -> Job:
    with executor.batch():
        return executor.start([sys.executable, "-c", *arguments], {**os.environ, "MEMBER": log.stem}, log)


def test_jobs_report_how_members_end_and_pass_signals_on(tmp_path: Path):
    executor = SlurmExecutor(tmp_path / "jobs", "local", 2, {"timeout_min": 5})
    ended = start(executor, tmp_path / "1.log", "import os, sys; print(os.environ['MEMBER']); sys.exit(7)")
    stopped = start(executor, tmp_path / "2.log", SAVES)
    wait(lambda: executor.poll(ended) is not None)
    assert executor.poll(ended) == 7 and (tmp_path / "1.log").read_text() == "1\n"
    wait(lambda: (tmp_path / "2.log").read_text() == "trains\n")
    assert executor.poll(stopped) is None
    executor.stop(stopped, signal.SIGINT)
    wait(lambda: executor.poll(stopped) is not None)
    assert executor.poll(stopped) == 130 and (tmp_path / "2.log").read_text() == "trains\nsaved\n"


def test_a_command_that_does_not_exist_ends_its_job_with_the_reason_in_the_log(tmp_path: Path):
    executor = SlurmExecutor(tmp_path / "jobs", "local", 1, {"timeout_min": 5})
    with executor.batch():
        job = executor.start(["/no/such/program"], dict(os.environ), tmp_path / "1.log")
    wait(lambda: executor.poll(job) is not None)
    assert executor.poll(job) == 1 and "No such file" in (tmp_path / "1.log").read_text()


def test_a_machine_without_slurm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="Type the command on a machine that can submit jobs"):
        SlurmExecutor(tmp_path / "jobs")


@pytest.mark.slow
@pytest.mark.skipif(not slurm_cluster.is_installed(), reason="needs apt-get install slurm-wlm munge, and root")
def test_a_sweep_on_a_cluster_survives_its_own_end_time_limits_and_signals(tmp_path: Path):
    with slurm_cluster.running_cluster(tmp_path) as variables:
        environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        settings = [
            "hydra/launcher=slurm",
            "hydra.launcher.gpus=null",
            "hydra.launcher.cpus=1",
            f"out={tmp_path / 'out'}",
        ]
        settings += ["evaluation.images=0", "dataset.pairs=8", "dataset.held_out=2", "tracking=none"]

        def sweep(*arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "trainer", "-m", *settings, *arguments]
            return subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )

        def queue() -> list[str]:
            command = ["squeue", "--noheader", "--array", "--format=%i %T"]
            return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.splitlines()

        def log(number: int) -> str:
            return next((tmp_path / "out").glob(f"sweeps/*/{number}.log")).read_text()

        many = ("method.rank=2,4", "steps=1000", "evaluation.every=500")
        process = sweep(*many)
        wait(lambda: list((tmp_path / "out").glob("*/journal.jsonl")) and len(queue()) == 2 and "%" in log(1))
        process.kill()
        process.communicate()
        assert sorted(line.split()[1] for line in queue()) == ["RUNNING"] * 2, "jobs outlive the sweep"

        process = sweep(*many)
        time.sleep(15)
        first = min(line.split()[0] for line in queue())
        # What SLURM sends before the time limit.
        subprocess.run(["scancel", "--signal=USR2", first], env=environment, check=True)
        wait(lambda: f"{first} RUNNING" not in queue(), 60)
        wait(lambda: "continuing at step" in log(1), 300)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=240)
        assert process.returncode == 143 and text.count("still runs") == 2, text
        (record,) = (tmp_path / "out").glob("sweeps/*/sweep.json")
        members = json.loads(record.read_text())["members"]
        assert [member["status"] for member in members] == ["stopped"] * 2, text
        assert all("saved at step" in member["reason"] for member in members)
        assert queue() == []
        for number in (1, 2):
            steps = [json.loads(line).get("step") for line in journal_lines(members[number - 1])]
            assert steps == sorted(set(steps)), "no member ran twice"


def journal_lines(member: dict) -> list[str]:
    lines = (Path(member["folder"]) / "journal.jsonl").read_text().splitlines()
    return [line for line in lines if '"train/loss"' in line]
