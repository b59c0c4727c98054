"""Hydra's door to trainer/sweep.py: Hydra takes launchers only from this namespace package. Every start of Hydra reads this file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write


class Result(JobReturn):
    """A member's held-out loss for the sweeper, or the exception that says it has none."""

    @property
    def return_value(self) -> Any:
        # As in Hydra, without a line of its own on the terminal.
        if isinstance(self._return_value, Exception):
            raise self._return_value
        return self._return_value


class Processes(Launcher):
    """Each job of a sweep as a process of its own, `slots` at once. Selected by `hydra/launcher=processes`, which is the default."""

    def __init__(self, slots: int = 1):
        self.slots = slots

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from trainer import sweep

        self.config, self.begin = config, getattr(task_function, "begin", lambda: None)
        id = sweep.identity(config.hydra.overrides.task, OmegaConf.to_container(config.hydra.sweeper))
        with read_write(config), open_dict(config):
            # Where the sweeper keeps what it was asked for.
            config.hydra.sweep.dir = str(Path(config.hydra.sweep.dir) / id)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from trainer import sweep

        sources = config_dirs(self.config)
        tracking = OmegaConf.to_object(self.config.tracking)
        folder = Path(self.config.hydra.sweep.dir)
        self.begin()
        members = sweep.Sweep(folder, Path(self.config.out), tracking, self.slots, sources)
        done = members.run(
            [[text for text in texts if not text.startswith("hydra")] for texts in job_overrides], initial_job_idx
        )
        return [self._result(member, members.verdict()) for member in done]

    def _result(self, member: Any, verdict: str) -> Result:
        from trainer import sweep

        if member.status == sweep.FINISHED:
            return Result(overrides=member.overrides, status=JobStatus.COMPLETED, _return_value=member.best_loss)
        return Result(overrides=member.overrides, status=JobStatus.FAILED, _return_value=sweep.Failed(verdict))


def config_dirs(config: DictConfig) -> list[str]:
    """The --config-dir of this command line, for the members."""
    paths = [source.path for source in config.hydra.runtime.config_sources if source.provider == "command-line"]
    return [text for path in paths for text in ("--config-dir", path.removeprefix("file://"))]
