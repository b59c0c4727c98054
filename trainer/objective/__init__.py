"""What a network learns to predict: times, noising, loss and sampling of one formulation, in one file each."""

from __future__ import annotations

from trainer.objective.diffusion import Diffusion, Prediction, Schedule
from trainer.objective.flow import Flow, Times

__all__ = ["Diffusion", "Flow", "Prediction", "Schedule", "Times"]
