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
from trainer.core.settings import added
from trainer.objective.options import ObjectiveOptions

if TYPE_CHECKING:
    import torch


DEFAULT_MODE_SCALE = 1.29
"""That of diffusers' examples."""
MAX_MODE_SCALE = 2 / (math.pi - 2)
"""Above it, the times of `TimeDistribution.mode` are no longer a function that increases (Esser et al. 2024)."""
SMALLEST_WEIGHTED_TIME = 1e-3
"""Smaller times have its weight: that of the smallest sigma of diffusers' schedulers. 1 / t^2 has no upper limit."""


class TimeDistribution(Enum):
    """Distribution of training times before the resolution shift (Esser et al. 2024, section 3.1).

    `mode` prefers the middle, or for a negative `mode_scale` both ends, and never leaves out a time.
    """

    logit_normal = "logit_normal"
    uniform = "uniform"
    mode = "mode"


class Weighting(Enum):
    """Weight of the loss at time t, by the names of diffusers' `compute_loss_weighting_for_sd3`.

    `sigma_sqrt`: 1 / t^2. `cosmap`: 2 / (pi (1 - 2 t + 2 t^2)). The other names there, `logit_normal` and `mode`, are
    distributions of t: `TimeDistribution`.
    """

    none = "none"
    sigma_sqrt = "sigma_sqrt"
    cosmap = "cosmap"


@dataclass(slots=True)
class Flow(ObjectiveOptions):
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
    mode_scale: float = added(DEFAULT_MODE_SCALE)
    """Scale s of `mode` times."""
    weighting: Weighting = added(Weighting.none)

    def __post_init__(self) -> None:
        ObjectiveOptions.__post_init__(self)
        if not -1 <= self.mode_scale <= MAX_MODE_SCALE:
            raise UsageError(
                f"model.objective.mode_scale={self.mode_scale:g} is out of range; type a number from -1 to "
                f"{MAX_MODE_SCALE:.2f}, such as 1.29"
            )
        if self.mode_scale != DEFAULT_MODE_SCALE and self.times is not TimeDistribution.mode:
            raise UsageError(
                "model.objective.mode_scale has no effect without another setting; type model.objective.times=mode as "
                "well, or leave it out"
            )
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
        if self.times is TimeDistribution.mode:
            # Eq. 20 of Esser et al. 2024, which decreases, at 1 - quantile.
            bend = math.sin(math.pi * quantile / 2) ** 2 - quantile
            return shift_time(quantile - self.mode_scale * bend, shift)
        return shift_time(1 / (1 + math.exp(-NormalDist(self.mean, self.std).inv_cdf(quantile))), shift)

    def unweighted(self) -> Flow:
        """Returns the objective with the mean squared error and equal weights for all times."""
        return self.with_plain_loss(weighting=Weighting.none)

    def relative_time(self, t: torch.Tensor) -> torch.Tensor:
        """Returns the times unchanged."""
        return t

    def noise_to_signal(self, t: torch.Tensor) -> torch.Tensor:
        """Returns t / (1 - t)."""
        return t / (1 - t)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns x_t = (1 - t) latents + t noise."""
        t = t.view(-1, *[1] * (latents.dim() - 1))
        return (1 - t) * latents + t * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns noise - latents, the derivative of x_t with respect to t."""
        return noise - latents

    def weight_by_time(self, losses: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the losses times the weights of their times; see `Weighting`."""
        if self.weighting is Weighting.sigma_sqrt:
            return losses / t.clamp(min=SMALLEST_WEIGHTED_TIME).square()
        if self.weighting is Weighting.cosmap:
            return losses * 2 / (math.pi * (1 - 2 * t + 2 * t.square()))
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
