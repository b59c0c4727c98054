"""Submits the members of a sweep as jobs of SLURM, with submitit."""

from __future__ import annotations

import getpass
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.core import documents, files
from trainer.core.errors import InstallationError, TrainerError, UsageError
from trainer.sweep.executors import Executor

QUEUE_SECONDS = 5.0
"""Time between two questions to SLURM's queue."""
RESULT_SECONDS = 30.0
"""Time after a job has left the queue in which a shared file system may still show its result."""
JOB_SECONDS = 0.5
"""Time between two looks of a job at its member and at its stop file."""


@dataclass(slots=True)
class MemberJob:
    """What a job runs: the process of one member. submitit pickles it.

    SLURM tells a job that its time is over or that another one needs its place. The member then saves, and the job is
    queued again, where the same command continues.
    """

    command: list[str]
    environment: dict[str, str]
    """Variables that are added to those of the job."""
    log: str
    stop_file: str
    """A file with the number of a signal to pass on. It appears if the sweep is told to stop."""
    process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Returns the exit code of the member."""
        environment = {**os.environ, **self.environment}
        if threads := os.environ.get("SLURM_CPUS_PER_TASK"):
            environment.setdefault("OMP_NUM_THREADS", threads)
        with open(self.log, "ab") as output:
            # SLURM sends the signal about the time limit to every process of the job. Only the job itself handles it.
            self.process = subprocess.Popen(
                self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_ignore_user_signals,
            )
        is_stopping = False
        while (code := self.process.poll()) is None:
            if not is_stopping and os.path.exists(self.stop_file):
                is_stopping = True
                self.process.send_signal(int(Path(self.stop_file).read_text()))
            time.sleep(JOB_SECONDS)
        if code in (143, -signal.SIGTERM) and not is_stopping and "SLURM_JOB_ID" in os.environ:
            # SLURM itself has sent SIGTERM. submitit queues the job again on this signal.
            os.kill(os.getpid(), signal.SIGUSR2)
        return code

    def checkpoint(self) -> Any:
        """Called by submitit before the job is queued again: waits until the member has saved."""
        import submitit

        process, self.process = self.process, None
        if process is not None:
            process.terminate()
            # Not `wait`: this runs in a signal handler, which may have interrupted `poll`.
            while process.poll() is None:
                time.sleep(0.1)
        return submitit.helpers.DelayedSubmission(self)


def _ignore_user_signals() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


@dataclass(slots=True)
class Job:
    """A member that was submitted."""

    log: Path
    member: MemberJob | None
    """None of a job that an earlier process of the sweep has submitted."""
    submitted: Any = None
    """The job of submitit; None until it is submitted."""
    stop_signal: int = 0
    gone_since: float = 0.0
    """When the job was first missing in the queue; 0 while it is there."""


@dataclass(slots=True)
class SlurmExecutor(Executor[Job]):
    """Runs each member as a job of SLURM.

    Jobs outlive the process of the sweep: the same command finds those that are still queued or running.

    Args:
        folder: Folder for the scripts and results of jobs, on a disk that the nodes share.
        cluster: "slurm", or "local" for processes on this machine, as submitit names them.
        slots: Number of members that may be queued or running.
        parameters: What jobs ask for; see submitit's `AutoExecutor.update_parameters`.
        requeues: How often a job may be queued again after its time limit.
    """

    folder: Path
    cluster: str = "slurm"
    slots: int = 64
    parameters: dict[str, Any] = field(default_factory=dict)
    requeues: int = 100
    _executor: Any = None
    _new: list[Job] = field(default_factory=list)
    """Jobs that `batch` will submit."""
    _active: set[str] = field(default_factory=set)
    """IDs of the jobs in the queue when it was last read."""
    _read_at: float = -QUEUE_SECONDS

    def __post_init__(self) -> None:
        try:
            import submitit
        except ImportError:
            raise InstallationError(
                "hydra/launcher=slurm needs the package submitit; type pip install 'trainer[slurm]'"
            ) from None
        try:
            self._executor = submitit.AutoExecutor(
                self.folder,
                cluster=self.cluster,
                slurm_max_num_timeout=self.requeues,
                local_max_num_timeout=self.requeues,
            )
            self._executor.update_parameters(**self.parameters)
        except (RuntimeError, NameError, ValueError, AssertionError) as error:
            raise UsageError(
                f"hydra/launcher=slurm: {error}. Type the command on a machine that can submit jobs (sbatch), and "
                "check hydra.launcher"
            ) from error

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Members that are started inside are submitted together, as one job array."""
        yield
        new, self._new = self._new, []
        if not new:
            return
        with files.storage_errors("write", self.folder):
            if len(new) == 1:
                submitted = [self._executor.submit(new[0].member)]
            else:
                with self._executor.batch():
                    submitted = [self._executor.submit(job.member) for job in new]
        for job, entry in zip(new, submitted, strict=True):
            job.submitted = entry
            files.write_json(_id_file(job.log), {"id": entry.job_id})
            self._active.add(entry.job_id)

    def adopt(self, log: Path) -> Job | None:
        if self.cluster != "slurm":
            return None
        import submitit

        try:
            job_id = documents.read_json(_id_file(log))["id"]
        except (TrainerError, KeyError, TypeError):
            return None
        self._read_queue(at_once=True)
        if job_id not in self._active:
            return None
        _stop_file(log).unlink(missing_ok=True)
        return Job(log, None, submitit.SlurmJob(folder=self.folder, job_id=job_id))

    def start(self, command: Sequence[str], environment: dict[str, str], log: Path) -> Job | None:
        _stop_file(log).unlink(missing_ok=True)
        with files.storage_errors("write", log):
            log.write_bytes(b"")
        # The job has the other variables from SLURM, which also sets its own.
        added = {key: value for key, value in environment.items() if os.environ.get(key) != value}
        job = Job(log, MemberJob(list(command), added, str(log.absolute()), str(_stop_file(log).absolute())))
        self._new.append(job)
        return job

    def poll(self, handle: Job) -> int | None:
        code = self._result(handle)
        if code is not None:
            return code
        if handle.submitted is None or self._is_active(handle.submitted):
            handle.gone_since = 0.0
            return None
        handle.gone_since = handle.gone_since or time.monotonic()
        if handle.stop_signal:
            return 128 + handle.stop_signal
        return -signal.SIGKILL if time.monotonic() > handle.gone_since + RESULT_SECONDS else None

    def stop(self, handle: Job, number: int) -> None:
        handle.stop_signal = number
        if handle.submitted is None:
            return
        if number == signal.SIGKILL:
            handle.submitted.cancel(check=False)
            return
        with files.storage_errors("write", handle.log):
            _stop_file(handle.log).write_text(f"{number}")
        if self.cluster == "slurm":
            # A job that waits in the queue has no process that could end by itself.
            command = ["scancel", "--state=PENDING", handle.submitted.job_id]
            subprocess.run(command, check=False, capture_output=True)

    def _result(self, handle: Job) -> int | None:
        """Returns the exit code of the member if its job has ended; writes an error of the job to the log."""
        if handle.submitted is None or not handle.submitted.paths.result_pickle.exists():
            return None
        import submitit

        try:
            return handle.submitted.result()
        except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
            with suppress(OSError), open(handle.log, "a") as log:
                log.write(f"\n{error}\n")
            return 1

    def _is_active(self, submitted: Any) -> bool:
        if self.cluster != "slurm":
            return submitted.state == "RUNNING"
        self._read_queue()
        return submitted.job_id in self._active

    def _read_queue(self, at_once: bool = False) -> None:
        """Reads which jobs are queued or running. If SLURM does not answer, all jobs keep their state."""
        if not at_once and time.monotonic() < self._read_at + QUEUE_SECONDS:
            return
        self._read_at = time.monotonic()
        command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            self._active = set(done.stdout.split())


def _id_file(log: Path) -> Path:
    return log.with_suffix(".job")


def _stop_file(log: Path) -> Path:
    return log.with_suffix(".stop")
