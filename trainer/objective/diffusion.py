"""Denoising diffusion (Ho et al. 2020): x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise at whole timesteps t.

a_t is the product of all 1 - b up to t, where b_t is the variance of the noise added at timestep t; diffusers
calls it `alphas_cumprod`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError
from trainer.core.settings import added
from trainer.objective.options import ObjectiveOptions

if TYPE_CHECKING:
    import torch

PURE_NOISE = (
    "the last timestep is pure noise, and predicting the noise there teaches nothing about the image; type "
    "model.objective.prediction=v_prediction"
)


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


class Spacing(Enum):
    """Which timesteps sampling visits, by the names of diffusers (table 2 of Lin et al. 2024, arXiv 2305.08891).

    `leading` leaves out the last timesteps, `trailing` the first ones, `linspace` neither. Networks that know pure
    noise need `trailing` or `linspace`.
    """

    leading = "leading"
    trailing = "trailing"
    linspace = "linspace"


@dataclass(slots=True, frozen=True)
class NoiseScheduler:
    """What a diffusers scheduler says beyond the settings of `Diffusion`, under its names for it.

    The defaults are those of the published models.
    """

    rescale_betas_zero_snr: bool = False
    trained_betas: tuple[float, ...] | None = None
    """The variances of all timesteps, in place of a schedule."""
    timestep_spacing: Spacing = Spacing.leading
    steps_offset: int = 1
    """Added to the timesteps of `leading` spacing."""
    set_alpha_to_one: bool = False
    """Whether sampling ends at a_t = 1; otherwise at timestep 0, whose noise is too little to be visible."""
    clip_sample_range: float | None = None
    """Largest absolute value of the clean latents that a sampling step predicts; None for no limit."""


@dataclass(slots=True)
class Diffusion(ObjectiveOptions):
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
    rescale_betas_zero_snr: bool | None = added(None)
    """Whether the schedule is rescaled so that the last timestep is pure noise (Lin et al. 2024); null: as in the
    checkpoint's scheduler."""
    timestep_spacing: Spacing | None = added(None)
    """Which timesteps sampling visits; null: as in the checkpoint's scheduler."""

    def __post_init__(self) -> None:
        ObjectiveOptions.__post_init__(self)
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
        if self.rescale_betas_zero_snr and self.prediction is Prediction.epsilon:
            raise UsageError(f"model.objective.rescale_betas_zero_snr=true: {PURE_NOISE}")

    @property
    def scheduler(self) -> NoiseScheduler:
        """What holds beyond the settings if there is no checkpoint."""
        return NoiseScheduler(
            rescale_betas_zero_snr=bool(self.rescale_betas_zero_snr),
            timestep_spacing=self.timestep_spacing or Spacing.leading,
        )

    def follow(self, scheduler: NoiseScheduler) -> ScheduledDiffusion:
        """Returns the objective with what the settings leave to the checkpoint's scheduler.

        Raises errors.UsageError if the settings contradict the scheduler.
        """
        if self.rescale_betas_zero_snr is not None:
            scheduler = replace(scheduler, rescale_betas_zero_snr=self.rescale_betas_zero_snr)
        if self.timestep_spacing is not None:
            scheduler = replace(scheduler, timestep_spacing=self.timestep_spacing)
        if scheduler.rescale_betas_zero_snr and self.prediction is Prediction.epsilon:
            raise UsageError(
                f"The checkpoint's scheduler says rescale_betas_zero_snr=true, and model.objective.prediction=epsilon: "
                f"{PURE_NOISE}"
            )
        if scheduler.trained_betas and len(scheduler.trained_betas) != self.timesteps:
            raise UsageError(
                f"model.objective.timesteps={self.timesteps}, but the checkpoint's scheduler has "
                f"{len(scheduler.trained_betas)} trained_betas; type "
                f"model.objective.timesteps={len(scheduler.trained_betas)}"
            )
        settings = {f.name: getattr(self, f.name) for f in fields(Diffusion)}
        return ScheduledDiffusion(**settings, checkpoint=scheduler)

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
        """Returns the objective with the mean squared error and without Min-SNR weighting."""
        return self.with_plain_loss(min_snr=None)

    def relative_time(self, t: torch.Tensor) -> torch.Tensor:
        """Returns t / timesteps."""
        return t / self.timesteps

    def noise_to_signal(self, t: torch.Tensor) -> torch.Tensor:
        """Returns sqrt((1 - a_t) / a_t)."""
        a = self._alphas_cumprod_at(t, t)
        return ((1 - a) / a).sqrt()

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

    def sampling_times(self, steps: int, shift: float) -> list[float]:
        """Returns the timesteps of diffusers' schedulers; `shift` is not used.

        The last one, where sampling ends, is -1 if no timestep is left.
        """
        last, scheduler = self.timesteps - 1, self.scheduler
        stride = self.timesteps // steps
        if scheduler.timestep_spacing is Spacing.trailing:
            times = [round(self.timesteps - i * self.timesteps / steps) - 1 for i in range(steps)]
        elif scheduler.timestep_spacing is Spacing.linspace:
            times = [round(last * i / (steps - 1)) if steps > 1 else 0 for i in reversed(range(steps))]
        else:
            times = [min(i * stride + scheduler.steps_offset, last) for i in reversed(range(steps))]
        return [float(t) for t in (*times, max(times[-1] - stride, -1))]

    def sample(
        self, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, times: Sequence[float]
    ) -> torch.Tensor:
        """Samples with deterministic DDIM (Song et al. 2021, eq. 12).

        Where the times are evenly spaced, the result equals that of DDIMScheduler; elsewhere EulerDiscreteScheduler's,
        because DDIMScheduler steps by an even width regardless.
        """
        scheduler, table = self.scheduler, self._table()
        before_first = 1.0 if scheduler.set_alpha_to_one else table[0]
        latents = noise
        for t, next_t in pairwise(times):
            a, next_a = table[int(t)], table[int(next_t)] if next_t >= 0 else before_first
            prediction = predict(latents, latents.new_full((len(latents),), t)).to(latents.dtype)
            if self.prediction is Prediction.epsilon:
                epsilon = prediction
                clean = (latents - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
            else:
                epsilon = math.sqrt(a) * prediction + math.sqrt(1 - a) * latents
                # Not from epsilon: a is 0 at pure noise.
                clean = math.sqrt(a) * latents - math.sqrt(1 - a) * prediction
            if scheduler.clip_sample_range is not None:
                clean = clean.clamp(-scheduler.clip_sample_range, scheduler.clip_sample_range)
            latents = math.sqrt(next_a) * clean + math.sqrt(1 - next_a) * epsilon
        return latents

    def _table(self) -> tuple[float, ...]:
        """Returns a_t of every timestep."""
        scheduler = self.scheduler
        return alphas_cumprod(
            self.schedule,
            self.beta_start,
            self.beta_end,
            self.timesteps,
            scheduler.trained_betas,
            scheduler.rescale_betas_zero_snr,
        )

    def _alphas_cumprod_at(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Returns a_t for timesteps (B,), which broadcasts with `like` (B, ...) and has its dtype."""
        import torch

        table = torch.tensor(self._table(), dtype=like.dtype, device=like.device)
        return table[t.long()].view(-1, *[1] * (like.dim() - 1))


@dataclass(slots=True)
class ScheduledDiffusion(Diffusion):
    """The objective of a checkpoint: the settings, and what its scheduler says beyond them."""

    checkpoint: NoiseScheduler = field(default_factory=NoiseScheduler)

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.checkpoint


@cache
def alphas_cumprod(
    schedule: Schedule,
    start: float,
    end: float,
    timesteps: int,
    trained_betas: tuple[float, ...] | None = None,
    zero_snr: bool = False,
) -> tuple[float, ...]:
    """Returns a_t of every timestep: the share of the variance of x_t that comes from the clean latents.

    `trained_betas` replace the schedule. With `zero_snr` sqrt(a_t) is rescaled to end at 0 and start where it does
    (algorithm 1 of Lin et al. 2024).
    """

    def cosine(progress: float) -> float:
        return math.cos((progress + 0.008) / 1.008 * math.pi / 2) ** 2

    def beta(t: int) -> float:
        if trained_betas is not None:
            return trained_betas[t]
        if schedule is Schedule.squaredcos_cap_v2:
            return min(1 - cosine((t + 1) / timesteps) / cosine(t / timesteps), 0.999)
        power = 2 if schedule is Schedule.scaled_linear else 1
        first, last = start ** (1 / power), end ** (1 / power)
        return (first + (last - first) * t / (timesteps - 1)) ** power

    table, product = [], 1.0
    for t in range(timesteps):
        product *= 1 - beta(t)
        table.append(product)
    if zero_snr:
        first, last = math.sqrt(table[0]), math.sqrt(table[-1])
        table = [((math.sqrt(a) - last) * first / (first - last)) ** 2 for a in table]
    return tuple(table)
