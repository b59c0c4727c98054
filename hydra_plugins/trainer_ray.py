"""Hydra launcher that runs each member of a sweep on a Ray cluster.

Hydra finds launchers only in this namespace package, and imports this module at every start.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hydra_plugins.trainer_launcher import SweepLauncher

if TYPE_CHECKING:
    from trainer.sweep.executors.ray import RayExecutor


class Ray(SweepLauncher):
    """Runs members on the nodes of a Ray cluster; see `conf/hydra/launcher/ray.yaml`."""

    def __init__(self, address: str = "auto", slots: int = 64, gpus: float = 1, cpus: float = 1):
        self.address, self.slots, self.gpus, self.cpus = address, slots, gpus, cpus

    def executor(self, folder: Path) -> RayExecutor:
        from trainer.sweep.executors.ray import RayExecutor

        return RayExecutor(self.address, self.slots, self.gpus, self.cpus)

    def check_settings(self) -> None:
        from trainer.core.errors import UsageError

        super().check_settings()
        if self.gpus < 0 or self.cpus <= 0:
            raise UsageError(
                f"hydra.launcher.gpus={self.gpus} hydra.launcher.cpus={self.cpus}: a member needs at least a share of "
                "a core, and no negative number of GPUs"
            )
