"""Training objectives: distribution of times, noise, loss and sampler of one formulation in one file each."""

from __future__ import annotations

from trainer.objective.base import Objective, denoising_losses
from trainer.objective.diffusion import Diffusion, NoiseScheduler, Prediction, Schedule, Spacing
from trainer.objective.flow import Flow, TimeDistribution, Weighting
from trainer.objective.options import HuberSchedule, Loss

__all__ = [
    "Diffusion",
    "Flow",
    "HuberSchedule",
    "Loss",
    "NoiseScheduler",
    "Objective",
    "Prediction",
    "Schedule",
    "Spacing",
    "TimeDistribution",
    "Weighting",
    "denoising_losses",
]
