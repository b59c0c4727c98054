"""What the launchers of this program share. A launcher adds the executor that runs the members of a sweep.

Hydra imports this module at every start.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

if TYPE_CHECKING:
    from trainer.sweep.executors import Executor
    from trainer.sweep.members import Member
    from trainer.sweep.plan import Plan


class MemberReturn(JobReturn):
    """Held-out loss of a member for the sweeper, or the exception to raise if there is none."""

    @property  # type: ignore[misc]  # Hydra's property has a setter, which is not needed here.
    def return_value(self) -> Any:
        # Like Hydra's implementation, which also prints a line of its own.
        if isinstance(self._return_value, Exception):
            raise self._return_value
        return self._return_value


class SweepLauncher(Launcher):
    """Runs the members of a sweep with an executor: those of a list, or those of a plan that learns from them."""

    slots: int

    @abstractmethod
    def executor(self, folder: Path) -> Executor[Any]:
        """Returns the executor of the sweep in `folder`. Raises errors.UsageError."""

    def check_settings(self) -> None:
        """Raises errors.UsageError if a setting of the launcher is wrong. Nothing is written before."""
        check_count("slots", self.slots)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from trainer.sweep.sweep import sweep_id

        self.check_settings()
        self.config = config
        self.deliver_signals = getattr(task_function, "deliver_signals", lambda: None)
        sweeper = OmegaConf.to_container(config.hydra.sweeper)
        assert isinstance(sweeper, dict)
        # A search may be continued with more trials or from another place.
        id = sweep_id(
            config.hydra.overrides.task, {k: v for k, v in sweeper.items() if k not in ("n_trials", "storage")}
        )
        with read_write(config), open_dict(config):
            # Sweepers write their records to this folder.
            config.hydra.sweep.dir = str(Path(config.hydra.sweep.dir) / id)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from trainer.core.errors import UsageError
        from trainer.sweep.plan import Grid

        if not job_overrides:
            raise UsageError(
                "This sweep has no members, because a setting has an empty range of values; type values such as "
                "optimizer.lr=1e-4,1e-3."
            )
        return self.run_plan(Grid([without_hydra(texts) for texts in job_overrides], initial_job_idx))[initial_job_idx:]

    def run_plan(self, plan: Plan) -> list[JobReturn]:
        """Runs the members of a plan. Returns how each member of the sweep so far has ended."""
        from trainer.sweep.sweep import Sweep
        from trainer.tracking import Tracking

        tracking = OmegaConf.to_object(self.config.tracking)
        assert isinstance(tracking, Tracking)
        folder, out = Path(self.config.hydra.sweep.dir), Path(self.config.out)
        self.deliver_signals()
        sweep = Sweep(folder, out, tracking, self.executor(folder), config_dir_flags(self.config))
        members = sweep.run(plan)
        return [member_return(member, plan.is_over(member), sweep.verdict()) for member in members]


def member_return(member: Member, is_over: bool, verdict: str) -> MemberReturn:
    """Converts the end of a member to what Hydra expects from a job."""
    from trainer.sweep.sweep import MembersFailedError

    if is_over:
        return MemberReturn(overrides=member.overrides, status=JobStatus.COMPLETED, _return_value=member.best_loss)
    error = MembersFailedError(verdict)
    return MemberReturn(overrides=member.overrides, status=JobStatus.FAILED, _return_value=error)


def check_count(name: str, value: object) -> None:
    """Raises errors.UsageError unless a setting of a launcher is a whole number above 0."""
    from trainer.core.errors import UsageError

    if not isinstance(value, int) or value < 1:
        raise UsageError(f"hydra.launcher.{name}={value} must be a whole number above 0; type for example 2.")


def without_hydra(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of a member: settings of Hydra are those of the sweep."""
    return [text for text in overrides if not text.startswith("hydra")]


def config_dir_flags(config: DictConfig) -> list[str]:
    """Returns the `--config-dir` flags of this command line, which the members need as well."""
    paths = [source.path for source in config.hydra.runtime.config_sources if source.schema == "recipes"]
    return [text for path in paths for text in ("--config-dir", path)]
