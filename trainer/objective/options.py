"""Settings that all objectives share: the loss of an error, and noise with more than independent pixels."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Self

from trainer.core.errors import UsageError
from trainer.core.rng import normal, uniform
from trainer.core.settings import added

if TYPE_CHECKING:
    import torch


class Loss(Enum):
    """The loss of each latent pixel. e is the error of the prediction, c the Huber threshold.

    `l2`: e^2. `huber`: 2 c (sqrt(e^2 + c^2) - c), about e^2 for small errors and 2 c |e| for large ones. `smooth_l1`:
    the same divided by c. These are the pseudo-Huber losses of kohya's sd-scripts.
    """

    l2 = "l2"
    huber = "huber"
    smooth_l1 = "smooth_l1"


class HuberSchedule(Enum):
    """How the Huber threshold depends on the time, as in kohya's sd-scripts. s is the noise divided by the signal.

    `constant`: c = huber_c. `exponential`: from 1 without noise to huber_c at the largest time, exponentially. `snr`:
    huber_c + (1 - huber_c) / (1 + s)^2.
    """

    constant = "constant"
    exponential = "exponential"
    snr = "snr"


LOSS_SETTINGS = ("loss", "huber_c", "huber_schedule")


@dataclass(slots=True, kw_only=True)
class ObjectiveOptions:
    """Base class of the settings of objectives."""

    loss: Loss = added(Loss.l2)
    huber_c: float = added(0.1)
    """Threshold of the Huber losses."""
    huber_schedule: HuberSchedule = added(HuberSchedule.snr)
    noise_offset: float = added(0.0)
    """Standard deviation of a random number that is added to each channel of the noise; 0 disables this."""
    multires_noise_iterations: int = added(0)
    """Number of resolutions of pyramid noise (Whitaker 2023); 0 disables it."""
    multires_noise_discount: float = added(0.3)
    """Factor of each lower resolution relative to the one above."""

    def __post_init__(self) -> None:
        if not self.huber_c > 0:
            raise UsageError(
                f"model.objective.huber_c={self.huber_c:g} would make all losses zero; type a number above 0 such as "
                "0.1, or model.objective.loss=l2"
            )
        if self.noise_offset < 0:
            raise UsageError(
                f"model.objective.noise_offset={self.noise_offset:g} is a standard deviation; type a number above 0 "
                "such as 0.05, or 0 to disable it"
            )
        if self.multires_noise_iterations < 0:
            raise UsageError(
                f"model.objective.multires_noise_iterations={self.multires_noise_iterations} is not a number of "
                "resolutions; type 1 or more, such as 6, or 0 to disable this noise"
            )
        if not 0 < self.multires_noise_discount <= 1:
            raise UsageError(
                f"model.objective.multires_noise_discount={self.multires_noise_discount:g} is out of range; type a "
                "number above 0 and up to 1, such as 0.3"
            )
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.noise_offset and self.multires_noise_iterations:
            raise UsageError(
                "model.objective.noise_offset and multires_noise_iterations both add low frequencies to the noise; "
                "leave one of them out"
            )
        unused = ["huber_c", "huber_schedule"] if self.loss is Loss.l2 else []
        unused += [] if self.multires_noise_iterations else ["multires_noise_discount"]
        for setting in fields(ObjectiveOptions):
            if setting.name in unused and getattr(self, setting.name) != setting.default:
                needed = "loss=huber" if setting.name.startswith("huber") else "multires_noise_iterations=6"
                raise UsageError(
                    f"model.objective.{setting.name} has no effect without another setting; type "
                    f"model.objective.{needed} as well, or leave it out"
                )

    def check_latents(self, height: int, width: int) -> None:
        """Raises errors.UsageError if latents of this size are too small for the noise."""
        if self.multires_noise_iterations and min(height, width) < 2:
            raise UsageError(
                f"model.objective.multires_noise_iterations={self.multires_noise_iterations}: latents of "
                f"{width}x{height} have no lower resolution; type a larger dataset.resolution, or "
                "model.objective.multires_noise_iterations=0"
            )

    def draw_noise(self, shape: tuple[int, ...], *names: int | float | str) -> torch.Tensor:
        """Returns the noise (C, h, w) of a training sample, a function of `names`; see `core.rng`.

        Independent normal numbers, changed by `noise_offset` (Guttenberg 2023) or by pyramid noise.
        """
        noise = normal(shape, *names)
        if self.noise_offset:
            noise = noise + self.noise_offset * normal((*shape[:-2], 1, 1), *names, "offset")
        if self.multires_noise_iterations:
            noise = self._add_pyramid(noise, names)
        return noise

    def _add_pyramid(self, noise: torch.Tensor, names: tuple[int | float | str, ...]) -> torch.Tensor:
        """Adds noise of lower resolutions, and scales the sum to unit standard deviation.

        As `pyramid_noise_like` of kohya's sd-scripts, for one sample: level i is 2^i to 4^i times smaller, at random.
        """
        import torch

        size = noise.shape[-2:]
        for level in range(self.multires_noise_iterations):
            factor = (2 + 2 * uniform(*names, "pyramid factor", level)) ** level
            low = tuple(max(1, int(side / factor)) for side in size)
            added_noise = normal((*noise.shape[:-2], *low), *names, "pyramid", level)
            resized = torch.nn.functional.interpolate(added_noise[None], size=tuple(size), mode="bilinear")[0]
            noise = noise + resized * self.multires_noise_discount**level
            if 1 in low:
                break
        return noise / noise.std()

    def errors(self, prediction: torch.Tensor, target: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the loss of each latent pixel; see `Loss`."""
        squared = (prediction - target).square()
        if self.loss is Loss.l2:
            return squared
        c = self._huber_threshold(t).to(squared.dtype).view(-1, *[1] * (squared.dim() - 1))
        losses = 2 * ((squared + c.square()).sqrt() - c)
        return losses if self.loss is Loss.smooth_l1 else c * losses

    def _huber_threshold(self, t: torch.Tensor) -> torch.Tensor:
        c = self.huber_c
        if self.huber_schedule is HuberSchedule.exponential:
            return c ** self.relative_time(t)
        if self.huber_schedule is HuberSchedule.snr:
            return c + (1 - c) / (1 + self.noise_to_signal(t)).square()
        return t.new_full(t.shape, c)

    def with_plain_loss(self, **more: Any) -> Self:
        """Returns the objective with the mean squared error, and further changes."""
        plain: dict[str, Any] = {f.name: f.default for f in fields(ObjectiveOptions) if f.name in LOSS_SETTINGS}
        return replace(self, **plain, **more)

    def relative_time(self, t: torch.Tensor) -> torch.Tensor:
        """Returns the times (B,) divided by the number of timesteps, in [0, 1]."""
        raise NotImplementedError

    def noise_to_signal(self, t: torch.Tensor) -> torch.Tensor:
        """Returns the standard deviation of the noise divided by the factor of the latents at times (B,)."""
        raise NotImplementedError
