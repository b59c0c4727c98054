"""Hydra launcher that runs each member of a sweep as a job of SLURM.

Hydra finds launchers only in this namespace package, and imports this module at every start.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from hydra_plugins.trainer_launcher import SweepLauncher

if TYPE_CHECKING:
    from trainer.sweep.executors.slurm import SlurmExecutor


class Slurm(SweepLauncher):
    """Submits members with submitit; see `conf/hydra/launcher/slurm.yaml`."""

    def __init__(self, **settings: Any):
        self.settings = settings

    def executor(self, folder: Path) -> SlurmExecutor:
        from trainer.core.errors import UsageError
        from trainer.sweep.executors.slurm import SlurmExecutor

        own = dict(self.settings)
        slots, minutes = own.pop("slots"), own.pop("minutes")
        for name, value in {"slots": slots, "minutes": minutes}.items():
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"hydra.launcher.{name}={value} must be a whole number above 0")
        parameters = {
            "name": "trainer",
            "timeout_min": minutes,
            "gpus_per_node": own.pop("gpus"),
            "cpus_per_task": own.pop("cpus"),
            "mem_gb": own.pop("memory_gb"),
            "slurm_partition": own.pop("partition"),
            "slurm_signal_delay_s": own.pop("seconds_to_save"),
            "slurm_additional_parameters": OmegaConf.to_container(own.pop("sbatch")),
        }
        given = {key: value for key, value in parameters.items() if value is not None}
        return SlurmExecutor(folder / "jobs", own.pop("cluster"), slots, given, requeues=own.pop("requeues"))
