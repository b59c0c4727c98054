"""Hydra launcher that runs each member of a sweep in a process of its own.

Hydra finds launchers only in this namespace package, and imports this module at every start.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hydra_plugins.trainer_launcher import SweepLauncher

if TYPE_CHECKING:
    from trainer.sweep.executors.local import LocalExecutor


class Processes(SweepLauncher):
    """Runs members as processes on this machine, `slots` at a time. This is the default, `hydra/launcher=processes`."""

    def __init__(self, slots: int = 1):
        self.slots = slots

    def executor(self, folder: Path) -> LocalExecutor:
        from trainer.sweep.executors.local import LocalExecutor

        return LocalExecutor(self.slots)
