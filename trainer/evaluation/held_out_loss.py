"""The denoising loss on held-out samples, with fixed noise and times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer.core.batch import Batch, Example, collate, get_conditions, group_by_shape
from trainer.core.rng import normal
from trainer.objective import denoising_losses

if TYPE_CHECKING:
    import torch

    from trainer.model import Family

QUANTILES = tuple(i / 10 for i in range(1, 10))
"""Quantiles of the training times.

They are fixed, and so is the noise, so the losses of two runs differ only because their weights do.
"""


def held_out_loss(
    family: Family,
    predict: Callable[[torch.Tensor, torch.Tensor, Batch], torch.Tensor],
    samples: list[tuple[str, Example]],
    device: torch.device,
    batch_size: int,
) -> dict[str, float]:
    """Measures the loss of (sample id, example) pairs at nine fixed quantiles of the training times.

    Returns the mean as `val/loss`, and the mean at each quantile as `val/loss_q10` .. `val/loss_q90`. The noise is a
    function of sample id and quantile.
    """
    import torch

    objective = family.resolved_objective().unweighted()
    points = [(quantile, sample_id, example) for quantile in QUANTILES for sample_id, example in samples]
    losses = [0.0] * len(points)
    for indices in group_by_shape([example for _, _, example in points], batch_size):
        batch = {name: tensor.to(device) for name, tensor in collate([points[i][2] for i in indices]).items()}
        latents = batch["latents"].float()
        shape = tuple(latents.shape[1:])
        noise = torch.stack([normal(shape, "held-out", points[i][1], points[i][0]) for i in indices]).to(device)
        shift = family.time_shift(*shape[1:])
        t = torch.tensor([objective.quantile_to_time(points[i][0], shift) for i in indices]).to(device)
        with torch.no_grad():
            batch_losses = denoising_losses(objective, predict, latents, noise, t, get_conditions(batch))
        for i, loss in zip(indices, batch_losses.tolist(), strict=True):
            losses[i] = loss
    result = {"val/loss": math.fsum(losses) / len(losses)}
    for i, quantile in enumerate(QUANTILES):
        of_quantile = losses[i * len(samples) : (i + 1) * len(samples)]
        result[f"val/loss_q{quantile * 100:.0f}"] = math.fsum(of_quantile) / len(samples)
    return result
