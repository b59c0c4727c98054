"""Runs the members of a sweep on a Ray cluster."""

from __future__ import annotations

import fcntl
import importlib
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.errors import InstallationError, UsageError
from trainer.sweep.executors import Executor
from trainer.sweep.executors.local import lifeline
from trainer.sweep.members import LIFELINE_VARIABLE

PASSED_ON = ("HF_", "MLFLOW_", "PYTHONPATH")
"""Start of the names of variables that members on other machines need as well."""


class MemberActor:
    """The process of one member, on the node that Ray chooses. `stop` runs beside `run`, in a thread of its own."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._signal = 0

    def run(self, command: list[str], environment: dict[str, str], folder: str, log: str) -> int:
        """Runs a member in a working directory and returns its exit code.

        `environment` is added to the variables of this process, among which are the GPUs that Ray has chosen.
        """
        with open(log, "ab") as output:
            # As in `LocalExecutor`: waits until a member of an earlier sweep, which Ray may not have killed, has ended.
            fcntl.flock(output, fcntl.LOCK_EX)
            if self._signal:
                return 128 + self._signal
            output.truncate(0)
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                # Where Ray does not kill the processes of a worker that has died, they notice it and save.
                env={**os.environ, **environment, LIFELINE_VARIABLE: str(lifeline())},
                pass_fds=(lifeline(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self._process.wait()

    def stop(self, number: int) -> None:
        """Sends a signal to the member, as soon as it has started."""
        self._signal = number
        if self._process is not None:
            self._process.send_signal(number)


@dataclass(slots=True)
class RayMember:
    """A member that was given to Ray."""

    actor: Any
    result: Any
    """Reference to the exit code."""
    stop_signal: int = 0


class RayExecutor(Executor[RayMember]):
    """Runs each member on a node of a Ray cluster that has its share of GPUs and cores free.

    Args:
        address: Address of the cluster: "auto" for the one that this machine belongs to, "local" for one that lasts as
            long as the sweep.
        slots: Number of members that may run or wait for a free node.
        gpus: GPUs of a member; a fraction shares one.
        cpus: Cores of a member.

    Raises errors.UsageError if there is no such cluster, errors.InstallationError without Ray.
    """

    def __init__(self, address: str = "auto", slots: int = 64, gpus: float = 1, cpus: float = 1):
        try:
            ray = _import_ray()
        except ImportError:
            raise InstallationError(
                "hydra/launcher=ray needs the package ray; type pip install 'trainer[ray]'"
            ) from None
        self.slots = slots
        if not ray.is_initialized():
            try:
                # The members have signal handlers of their own, and the sweep has its own.
                ray.init(address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
            except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UsageError(
                    f"hydra.launcher.address={address}: there is no Ray cluster ({reason}). Start one with ray start "
                    "--head, or type hydra.launcher.address=local for this machine alone"
                ) from error
        self._actor = ray.remote(num_gpus=gpus, num_cpus=cpus, max_concurrency=2, max_restarts=0)(MemberActor)

    def start(self, command: Sequence[str], environment: dict[str, str], log: Path) -> RayMember | None:
        actor = self._actor.remote()
        added = {
            key: value
            for key, value in environment.items()
            if key.startswith(PASSED_ON) or os.environ.get(key) != value
        }
        return RayMember(actor, actor.run.remote(list(command), added, os.getcwd(), str(log.absolute())))

    def poll(self, handle: RayMember) -> int | None:
        ray = _import_ray()
        done, _ = ray.wait([handle.result], timeout=0)
        if not done:
            return None
        try:
            return ray.get(handle.result)
        except ray.exceptions.RayError:
            # The node or the worker has died, or the member was cancelled before it began.
            return 128 + handle.stop_signal if handle.stop_signal else -signal.SIGKILL
        finally:
            # Frees the GPUs for the next member.
            ray.kill(handle.actor)

    def stop(self, handle: RayMember, number: int) -> None:
        ray = _import_ray()
        handle.stop_signal = number
        if number == signal.SIGKILL:
            ray.kill(handle.actor)
            return
        # Ray's workers ignore SIGINT, and their children inherit that.
        reference = handle.actor.stop.remote(signal.SIGTERM)
        with suppress(ray.exceptions.RayError):
            done, _ = ray.wait([reference], timeout=5)
            if not done:
                # The actor still waits for a free node.
                ray.kill(handle.actor)


def _import_ray() -> Any:
    """Returns Ray, untyped: the declarations of `ray.remote` leave out options of actors."""
    return importlib.import_module("ray")
