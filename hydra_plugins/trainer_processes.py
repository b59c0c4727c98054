"""Hydra launcher that runs each member of a sweep in a process of its own.

Hydra finds launchers only in this namespace package, and imports this module at every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

if TYPE_CHECKING:
    from trainer.sweep.members import Member


class MemberReturn(JobReturn):
    """Held-out loss of a member for the sweeper, or the exception to raise if there is none."""

    @property  # type: ignore[misc]  # Hydra's property has a setter, which is not needed here.
    def return_value(self) -> Any:
        # Like Hydra's implementation, which also prints a line of its own.
        if isinstance(self._return_value, Exception):
            raise self._return_value
        return self._return_value


class Processes(Launcher):
    """Runs members as processes on this machine, `slots` at a time. This is the default, `hydra/launcher=processes`."""

    def __init__(self, slots: int = 1):
        self.slots = slots

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from trainer.core.errors import UsageError
        from trainer.sweep.sweep import sweep_id

        if not isinstance(self.slots, int) or self.slots < 1:
            raise UsageError(f"hydra.launcher.slots={self.slots} must be a whole number above 0; type for example 2.")
        self.config = config
        self.deliver_signals = getattr(task_function, "deliver_signals", lambda: None)
        id = sweep_id(config.hydra.overrides.task, OmegaConf.to_container(config.hydra.sweeper))
        with read_write(config), open_dict(config):
            # Sweepers write their records to this folder.
            config.hydra.sweep.dir = str(Path(config.hydra.sweep.dir) / id)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from trainer.core.errors import UsageError
        from trainer.sweep.executors.local import LocalExecutor
        from trainer.sweep.sweep import Sweep
        from trainer.tracking import Tracking

        if not job_overrides:
            raise UsageError(
                "This sweep has no members, because a setting has an empty range of values; type values such as "
                "optimizer.lr=1e-4,1e-3."
            )
        flags = config_dir_flags(self.config)
        tracking = OmegaConf.to_object(self.config.tracking)
        assert isinstance(tracking, Tracking)
        folder, out = Path(self.config.hydra.sweep.dir), Path(self.config.out)
        self.deliver_signals()
        sweep = Sweep(folder, out, tracking, LocalExecutor(self.slots), flags)
        overrides = [[text for text in texts if not text.startswith("hydra")] for texts in job_overrides]
        members = sweep.run(overrides, initial_job_idx)
        return [member_return(member, sweep.verdict()) for member in members]


def member_return(member: Member, verdict: str) -> MemberReturn:
    """Converts the end of a member to what Hydra expects from a job."""
    from trainer.sweep.members import State
    from trainer.sweep.sweep import MembersFailedError

    if member.status == State.FINISHED:
        return MemberReturn(overrides=member.overrides, status=JobStatus.COMPLETED, _return_value=member.best_loss)
    error = MembersFailedError(verdict)
    return MemberReturn(overrides=member.overrides, status=JobStatus.FAILED, _return_value=error)


def config_dir_flags(config: DictConfig) -> list[str]:
    """Returns the `--config-dir` flags of this command line, which the members need as well."""
    paths = [source.path for source in config.hydra.runtime.config_sources if source.schema == "recipes"]
    return [text for path in paths for text in ("--config-dir", path)]
