"""Denoising diffusion (Ho et al. 2020): x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise at whole timesteps, and the network predicts noise or velocity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError

if TYPE_CHECKING:
    import torch

OFFSET = 1
"""Of the timesteps at which pictures are drawn: `steps_offset` in the scheduler configurations of the published models."""


class Prediction(Enum):
    """What the network is asked for: the noise (Ho et al. 2020), or v = sqrt(a) noise - sqrt(1 - a) x0 (Salimans & Ho 2022)."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"


class Schedule(Enum):
    """How the variances b_t of the noise added at each timestep grow; diffusers' names.

    `linear` in b (Ho et al. 2020), `scaled_linear` in its square root (latent diffusion, Rombach et al. 2022), `squaredcos_cap_v2` a squared
    cosine in a_t (Nichol & Dhariwal 2021), which asks for no start and end.
    """

    linear = "linear"
    scaled_linear = "scaled_linear"
    squaredcos_cap_v2 = "squaredcos_cap_v2"


@dataclass(slots=True)
class Diffusion:
    """Settings of the diffusion objective. `min_snr` is gamma of Min-SNR weighting (Hang et al. 2023, who take 5), null for none."""

    prediction: Prediction = Prediction.epsilon
    schedule: Schedule = Schedule.scaled_linear
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000
    min_snr: float | None = None

    def __post_init__(self) -> None:
        if self.timesteps < 2:
            raise UsageError(
                f"model.objective.timesteps={self.timesteps} leaves no way from noise to picture; type 1000, or another number from 2"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UsageError(
                f"model.objective.beta_start={self.beta_start:g} and beta_end={self.beta_end:g} are no variances that grow within 0 and 1; "
                "type for example beta_start=0.00085 and beta_end=0.012"
            )
        if self.min_snr is not None and not self.min_snr > 0:
            raise UsageError(
                f"model.objective.min_snr={self.min_snr:g} weighs everything away; type a number above 0 such as 5, or null for none"
            )

    def check(self, sample_steps: int) -> None:
        """Raise errors.UsageError for more steps of drawing than there are timesteps."""
        if sample_steps > self.timesteps:
            raise UsageError(
                f"sample.steps={sample_steps}: the model knows {self.timesteps} timesteps; type sample.steps={self.timesteps} or fewer"
            )

    def time(self, quantile: float, shift: float) -> float:
        """The timestep (0, 1, ...) below or at which this share of training times lies: all are equally likely. `shift` is of flows alone."""
        return float(min(int(quantile * self.timesteps), self.timesteps - 1))

    def unweighted(self) -> Diffusion:
        """The same where all times count alike, for losses that are compared between runs."""
        return replace(self, min_snr=None)

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x_t for `clean`, `noise` (B, ...) and timesteps `time` (B,)."""
        signal = self._signal(clean, time)
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise

    def losses(
        self,
        prediction: torch.Tensor,
        clean: torch.Tensor,
        noise: torch.Tensor,
        time: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean squared error of each sample, (B,), in the type of `clean`: float32 in training. `weight` (B, 1, h, w) multiplies the errors."""
        signal = self._signal(clean, time)
        is_v = self.prediction is Prediction.v_prediction
        wanted = signal.sqrt() * noise - (1 - signal).sqrt() * clean if is_v else noise
        errors = (prediction.to(clean.dtype) - wanted).square()
        losses = (errors if weight is None else errors * weight).flatten(1).mean(1)
        if self.min_snr is None:
            return losses
        # Equal weights for x0 up to the cap: an error in v counts SNR + 1 times its square in x0, one in the noise SNR times.
        snr = (signal / (1 - signal)).flatten()
        return losses * snr.clamp(max=self.min_snr) / (snr + 1 if is_v else snr)

    def sample(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        noise: torch.Tensor,
        steps: int,
        shift: float,
    ) -> torch.Tensor:
        """DDIM without noise (Song et al. 2021, eq. 12) from `noise` (B, ...) down to clean latents, at the timesteps that diffusers' DDIMScheduler
        takes with `leading` spacing."""
        stride = self.timesteps // steps
        times = [min(i * stride + OFFSET, self.timesteps - 1) for i in reversed(range(steps))]
        # The last step ends at the first timestep, whose noise is too little to be seen (set_alpha_to_one=False).
        x, signals = noise, signal_shares(self.schedule, self.beta_start, self.beta_end, self.timesteps)
        for now, later in pairwise([*times, times[-1] - stride]):
            signal, next_signal = signals[now], signals[max(later, 0)]
            out = predict(x, x.new_full((len(x),), now)).to(x.dtype)
            is_v = self.prediction is Prediction.v_prediction
            epsilon = math.sqrt(signal) * out + math.sqrt(1 - signal) * x if is_v else out
            clean = (x - math.sqrt(1 - signal) * epsilon) / math.sqrt(signal)
            x = math.sqrt(next_signal) * clean + math.sqrt(1 - next_signal) * epsilon
        return x

    def _signal(self, like: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """a_t for timesteps (B,), to be multiplied with tensors like this (B, ...)."""
        import torch

        shares = signal_shares(self.schedule, self.beta_start, self.beta_end, self.timesteps)
        return torch.tensor(shares, dtype=like.dtype, device=like.device)[time.long()].view(-1, *[1] * (like.dim() - 1))


@cache
def signal_shares(schedule: Schedule, start: float, end: float, timesteps: int) -> tuple[float, ...]:
    """a_t of every timestep: the share of the clean picture's variance that is left in x_t, the product of all 1 - b up to t."""

    def left(progress: float) -> float:
        return math.cos((progress + 0.008) / 1.008 * math.pi / 2) ** 2

    def beta(t: int) -> float:
        if schedule is Schedule.squaredcos_cap_v2:
            return min(1 - left((t + 1) / timesteps) / left(t / timesteps), 0.999)
        power = 2 if schedule is Schedule.scaled_linear else 1
        low, high = start ** (1 / power), end ** (1 / power)
        return (low + (high - low) * t / (timesteps - 1)) ** power

    shares, share = [], 1.0
    for t in range(timesteps):
        share *= 1 - beta(t)
        shares.append(share)
    return tuple(shares)
