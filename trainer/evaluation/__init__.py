"""How good the network is on samples it does not train on: a loss that can be compared between runs, and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.core.batch import Example, collate, conditions, group_by_shape
from trainer.core.errors import UsageError
from trainer.core.rng import normal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trainer.model import Family

QUANTILES = tuple(i / 10 for i in range(1, 10))
"""Of the training times. Fixed, as the noise is, so that the losses of two runs differ by their weights alone."""


@dataclass(slots=True)
class Evaluation:
    """`every` steps (null: a quarter of the run, ten steps at least). `samples` bounds the held-out samples of the loss; `images` those that are drawn
    and compared with their targets (null: the family's own number); `shown` of them are logged as pictures. `prompts` are drawn
    instead of held-out captions, `images_per_prompt` each. `patience` ends the run after so many evaluations without a new best."""

    every: int | None = None
    samples: int = 32
    images: int | None = None
    shown: int = 4
    prompts: list[str] | None = None
    images_per_prompt: int = 1
    patience: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("every", 1),
            ("samples", 1),
            ("images", 0),
            ("shown", 0),
            ("images_per_prompt", 1),
            ("patience", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"evaluation.{name}={value} is too small; type {least} or more")


def held_out_loss(
    family: Family,
    predict: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor],
    rows: list[tuple[str, Example]],
    device: torch.device,
    at_once: int,
) -> dict[str, float]:
    """Mean loss over (sample id, row) pairs at nine fixed time quantiles, with noise fixed by the id: `val/loss`, and one value a quantile."""
    import torch

    objective = family.objective.unweighted()
    points = [(quantile, name, row) for quantile in QUANTILES for name, row in rows]
    losses = [0.0] * len(points)
    for chunk in group_by_shape([row for _, _, row in points], at_once):
        batch = {name: tensor.to(device) for name, tensor in collate([points[i][2] for i in chunk]).items()}
        clean = batch["latents"].float()
        noises = torch.stack(
            [normal(tuple(clean.shape[1:]), "held-out", points[i][1], points[i][0]) for i in chunk]
        ).to(device)
        shift = family.shift(*clean.shape[2:])
        times = torch.tensor([objective.quantile_to_time(points[i][0], shift) for i in chunk]).to(device)
        with torch.no_grad():
            prediction = predict(objective.add_noise(clean, noises, times), times, conditions(batch))
        for i, loss in zip(chunk, objective.losses(prediction, clean, noises, times).tolist(), strict=True):
            losses[i] = loss
    result = {"val/loss": math.fsum(losses) / len(losses)}
    for i, quantile in enumerate(QUANTILES):
        result[f"val/loss_q{quantile * 100:.0f}"] = math.fsum(losses[i * len(rows) : (i + 1) * len(rows)]) / len(rows)
    return result


def psnr(picture: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures (H, W, 3) in dB; 99 where they are equal."""
    import numpy as np

    error = float(np.mean((picture.astype(np.float64) - target) ** 2))
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


OPTIONS = {"held_out": Evaluation}
