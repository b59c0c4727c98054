"""Hydra launcher that runs each member of a sweep as a job of SLURM.

Hydra finds launchers only in this namespace package, and imports this module at every start.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from hydra_plugins.trainer_launcher import SweepLauncher, check_count

if TYPE_CHECKING:
    from trainer.sweep.executors.slurm import SlurmExecutor


class Slurm(SweepLauncher):
    """Submits members with submitit; see `conf/hydra/launcher/slurm.yaml`."""

    def __init__(self, slots: int, minutes: int, **settings: Any):
        self.slots, self.minutes, self.settings = slots, minutes, settings

    def check_settings(self) -> None:
        super().check_settings()
        check_count("minutes", self.minutes)

    def executor(self, folder: Path) -> SlurmExecutor:
        from trainer.sweep.executors.slurm import SlurmExecutor

        own = dict(self.settings)
        parameters = {
            "name": "trainer",
            "timeout_min": self.minutes,
            "gpus_per_node": own.pop("gpus"),
            "cpus_per_task": own.pop("cpus"),
            "mem_gb": own.pop("memory_gb"),
            "slurm_partition": own.pop("partition"),
            "slurm_signal_delay_s": own.pop("seconds_to_save"),
            "slurm_additional_parameters": OmegaConf.to_container(own.pop("sbatch")),
        }
        given = {key: value for key, value in parameters.items() if value is not None}
        return SlurmExecutor(folder / "jobs", own.pop("cluster"), self.slots, given, requeues=own.pop("requeues"))
