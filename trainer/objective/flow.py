"""Rectified flow: x_t = (1 - t) x0 + t noise, and the network predicts noise - x0.

Liu et al. 2022; Esser et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError

if TYPE_CHECKING:
    import torch


class TimeDistribution(Enum):
    """Distribution of training times before the resolution shift."""

    logit_normal = "logit_normal"
    uniform = "uniform"


@dataclass(slots=True)
class Flow:
    """Settings of the flow objective; see `Objective` for its methods.

    Times are in [0, 1]: 0 is the clean image, 1 is pure noise.
    """

    times: TimeDistribution = TimeDistribution.logit_normal
    mean: float = 0.0
    """Mean of logit(t) for logit-normal times."""
    std: float = 1.0
    """Standard deviation of logit(t) for logit-normal times."""
    terminal: float = 0.0
    """Time at the last step of sampling, to which the sampling times are stretched; 0 disables this."""

    def __post_init__(self) -> None:
        if not 0 <= self.terminal < 1:
            raise UsageError(
                f"model.objective.terminal={self.terminal:g} is out of range; "
                "type a number from 0 to below 1, such as 0.02"
            )
        if self.std <= 0:
            raise UsageError(f"model.objective.std={self.std:g} must be positive; type a number above 0, such as 1")

    def check_sample_steps(self, steps: int) -> None:
        """Accepts any number of steps."""

    def quantile_to_time(self, quantile: float, shift: float) -> float:
        """Returns a quantile of the training times, which are in (0, 1)."""
        if self.times is TimeDistribution.uniform:
            return shift_time(quantile, shift)
        return shift_time(1 / (1 + math.exp(-NormalDist(self.mean, self.std).inv_cdf(quantile))), shift)

    def unweighted(self) -> Flow:
        """Returns itself: all times have equal weights."""
        return self

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns x_t = (1 - t) latents + t noise."""
        t = t.view(-1, *[1] * (latents.dim() - 1))
        return (1 - t) * latents + t * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns noise - latents, the derivative of x_t with respect to t."""
        return noise - latents

    def weight_by_time(self, losses: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the losses unchanged."""
        return losses

    def sampling_times(self, steps: int, shift: float, smallest: float | None = None) -> list[float]:
        """Returns `steps` + 1 times from 1 to 0.

        Before the shift, all but the last are evenly spaced from 1 to `smallest`. The default is 1 / steps: the sigmas
        of diffusers' FlowMatchEulerDiscreteScheduler if the pipeline passes `sigmas` to it. If it does not, the
        scheduler starts from its own smallest sigma.
        """
        if smallest is None:
            times = [(steps - i) / steps for i in range(steps)]
        else:
            times = [1 - (1 - smallest) * i / max(steps - 1, 1) for i in range(steps)]
        times = [shift_time(t, shift) for t in times]
        if self.terminal and steps > 1:
            stretch = (1 - self.terminal) / (1 - times[-1])
            times = [1 - (1 - t) * stretch for t in times]
        return [*times, 0.0]

    def sample(
        self, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, times: Sequence[float]
    ) -> torch.Tensor:
        """Samples with Euler's method."""
        latents = noise
        for t, next_t in pairwise(times):
            prediction = predict(latents, latents.new_full((len(latents),), t))
            latents = latents + (next_t - t) * prediction.to(latents.dtype)
        return latents


def shift_time(t: float, shift: float) -> float:
    """Moves times towards noise for larger images: the resolution shift (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)
