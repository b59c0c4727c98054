"""Denoising diffusion (Ho et al. 2020): x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise at whole timesteps t.

a_t is the product of all 1 - b up to t, where b_t is the variance of the noise added at timestep t; diffusers
calls it `alphas_cumprod`.
"""

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

STEPS_OFFSET = 1
"""Offset of the timesteps of sampling: `steps_offset` in the scheduler configurations of the published models."""


class Prediction(Enum):
    """What the network predicts.

    `epsilon`: the noise (Ho et al. 2020). `v_prediction`: v = sqrt(a) noise - sqrt(1 - a) x0 (Salimans & Ho 2022).
    """

    epsilon = "epsilon"
    v_prediction = "v_prediction"


class Schedule(Enum):
    """How the variances b_t grow with t, by the names of diffusers.

    `linear`: linear in b (Ho et al. 2020). `scaled_linear`: linear in sqrt(b) (latent diffusion, Rombach et al. 2022).
    `squaredcos_cap_v2`: a_t is a squared cosine (Nichol & Dhariwal 2021); it does not use `beta_start` and `beta_end`.
    """

    linear = "linear"
    scaled_linear = "scaled_linear"
    squaredcos_cap_v2 = "squaredcos_cap_v2"


@dataclass(slots=True)
class Diffusion:
    """Settings of the diffusion objective; see `Objective` for its methods.

    Times are whole numbers from 0 to `timesteps` - 1.
    """

    prediction: Prediction = Prediction.epsilon
    schedule: Schedule = Schedule.scaled_linear
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000
    min_snr: float | None = None
    """Gamma of Min-SNR weighting (Hang et al. 2023, who use 5); null disables it."""

    def __post_init__(self) -> None:
        if self.timesteps < 2:
            raise UsageError(f"model.objective.timesteps={self.timesteps} is too few; type 2 or more, such as 1000")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UsageError(
                f"model.objective.beta_start={self.beta_start:g} and beta_end={self.beta_end:g} must satisfy "
                "0 < beta_start <= beta_end < 1; type for example beta_start=0.00085 and beta_end=0.012"
            )
        if self.min_snr is not None and not self.min_snr > 0:
            raise UsageError(
                f"model.objective.min_snr={self.min_snr:g} would make all losses zero; "
                "type a number above 0 such as 5, or null to disable it"
            )

    def check_sample_steps(self, steps: int) -> None:
        """Raises errors.UsageError if there are more sampling steps than timesteps."""
        if steps > self.timesteps:
            raise UsageError(
                f"sample.steps={steps}: the model has only {self.timesteps} timesteps; "
                f"type sample.steps={self.timesteps} or fewer"
            )

    def quantile_to_time(self, quantile: float, shift: float) -> float:
        """Returns a quantile of the training timesteps, which are all equally likely; `shift` is not used."""
        return float(min(int(quantile * self.timesteps), self.timesteps - 1))

    def unweighted(self) -> Diffusion:
        """Returns the objective without Min-SNR weighting."""
        return replace(self, min_snr=None)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns x_t = sqrt(a_t) latents + sqrt(1 - a_t) noise."""
        a = self._alphas_cumprod_at(t, latents)
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the noise, or v."""
        if self.prediction is Prediction.epsilon:
            return noise
        a = self._alphas_cumprod_at(t, latents)
        return a.sqrt() * noise - (1 - a).sqrt() * latents

    def weight_by_time(self, losses: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the losses times their Min-SNR weights."""
        if self.min_snr is None:
            return losses
        a = self._alphas_cumprod_at(t, losses)
        # The squared error of x0 has the weight min(SNR, gamma). The squared error of the noise is SNR times as large,
        # and that of v SNR + 1 times.
        snr = a / (1 - a)
        return losses * snr.clamp(max=self.min_snr) / (snr if self.prediction is Prediction.epsilon else snr + 1)

    def sample(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        noise: torch.Tensor,
        steps: int,
        shift: float,
    ) -> torch.Tensor:
        """Samples with deterministic DDIM (Song et al. 2021, eq. 12); `shift` is not used.

        The timesteps are those of diffusers' DDIMScheduler with `leading` spacing.
        """
        stride = self.timesteps // steps
        times = [min(i * stride + STEPS_OFFSET, self.timesteps - 1) for i in reversed(range(steps))]
        table = alphas_cumprod(self.schedule, self.beta_start, self.beta_end, self.timesteps)
        latents = noise
        # The last step ends at timestep 0, whose noise is too little to be visible (set_alpha_to_one=False).
        for t, next_t in pairwise([*times, times[-1] - stride]):
            a, next_a = table[t], table[max(next_t, 0)]
            prediction = predict(latents, latents.new_full((len(latents),), t)).to(latents.dtype)
            if self.prediction is Prediction.epsilon:
                epsilon = prediction
            else:
                epsilon = math.sqrt(a) * prediction + math.sqrt(1 - a) * latents
            clean = (latents - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
            latents = math.sqrt(next_a) * clean + math.sqrt(1 - next_a) * epsilon
        return latents

    def _alphas_cumprod_at(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Returns a_t for timesteps (B,), which broadcasts with `like` (B, ...) and has its dtype."""
        import torch

        values = alphas_cumprod(self.schedule, self.beta_start, self.beta_end, self.timesteps)
        table = torch.tensor(values, dtype=like.dtype, device=like.device)
        return table[t.long()].view(-1, *[1] * (like.dim() - 1))


@cache
def alphas_cumprod(schedule: Schedule, start: float, end: float, timesteps: int) -> tuple[float, ...]:
    """Returns a_t of every timestep: the share of the variance of x_t that comes from the clean latents."""

    def cosine(progress: float) -> float:
        return math.cos((progress + 0.008) / 1.008 * math.pi / 2) ** 2

    def beta(t: int) -> float:
        if schedule is Schedule.squaredcos_cap_v2:
            return min(1 - cosine((t + 1) / timesteps) / cosine(t / timesteps), 0.999)
        power = 2 if schedule is Schedule.scaled_linear else 1
        first, last = start ** (1 / power), end ** (1 / power)
        return (first + (last - first) * t / (timesteps - 1)) ** power

    table, product = [], 1.0
    for t in range(timesteps):
        product *= 1 - beta(t)
        table.append(product)
    return tuple(table)
