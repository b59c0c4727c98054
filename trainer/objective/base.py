"""The interface of an objective, and the loss that training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch


class Objective(Protocol):
    """A denoising formulation: how noise is added to latents, what the network predicts, and how images are sampled.

    Times `t` have shape (B,) and grow with the noise: the smallest time belongs to clean latents, the largest to
    pure noise. `Flow` uses real numbers from 0 to 1, `Diffusion` whole timesteps from 0 to `timesteps` - 1, both
    stored as floats. Latents, noise, predictions and targets have one shape, (B, C, h, w) for images.
    """

    def check_sample_steps(self, steps: int) -> None:
        """Raises errors.UsageError if the objective cannot sample with this number of steps."""

    def quantile_to_time(self, quantile: float, shift: float) -> float:
        """Returns a quantile of the distribution of training times.

        A uniform random quantile in (0, 1) gives a random training time; fixed quantiles give the times of the
        held-out loss. `shift` is the resolution shift of the model family (`Family.time_shift`), 1 for none.
        """

    def unweighted(self) -> Objective:
        """Returns the objective with the mean squared error and equal weights for all times.

        Losses of runs with different losses and weights can be compared by it.
        """

    def check_latents(self, height: int, width: int) -> None:
        """Raises errors.UsageError if the objective cannot train on latents of this size."""

    def draw_noise(self, shape: tuple[int, ...], *names: int | float | str) -> torch.Tensor:
        """Returns the noise (C, h, w) of a training sample as a function of `names`; see `core.rng.normal`."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the noisy latents x_t."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns what the network should predict for x_t."""

    def errors(self, prediction: torch.Tensor, target: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the loss of each latent pixel, in the shape of `target`."""

    def weight_by_time(self, losses: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Returns the losses (B,) times the weights of their times."""

    def sampling_times(self, steps: int, shift: float) -> list[float]:
        """Returns `steps` + 1 decreasing times: those at which sampling calls the network, and the one where it ends.

        `shift` is that of `Family.time_shift`.
        """

    def sample(
        self, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, times: Sequence[float]
    ) -> torch.Tensor:
        """Returns clean latents, sampled from `noise` (B, ...).

        Calls `predict(noisy latents, t)` at each of the `times` but the last; see `sampling_times`.
        """


def denoising_losses(
    objective: Objective,
    predict: Callable[[torch.Tensor, torch.Tensor, Batch], torch.Tensor],
    latents: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    conditions: Batch,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds noise to a batch of latents, predicts, and returns the loss of each sample, (B,).

    The loss is the mean of `objective.errors` (squared errors by default) in the type of `latents` (float32 in
    training). `weight` (B, 1, h, w) multiplies them. `predict(noisy latents, t, conditions)` is the network.
    """
    prediction = predict(objective.add_noise(latents, noise, t), t, conditions)
    errors = objective.errors(prediction.to(latents.dtype), objective.target(latents, noise, t), t)
    losses = (errors if weight is None else errors * weight).flatten(1).mean(1)
    return objective.weight_by_time(losses, t)
