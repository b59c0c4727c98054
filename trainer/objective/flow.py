"""Rectified flow (Liu et al. 2022; Esser et al. 2024): x_t = (1 - t) x0 + t noise, and the network predicts noise - x0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError

if TYPE_CHECKING:
    import torch


class Times(Enum):
    """How training times are spread before the resolution shift."""

    logit_normal = "logit_normal"
    uniform = "uniform"


@dataclass(slots=True)
class Flow:
    """Settings of the flow objective; `mean` and `std` are those of logit(t) where times are logit-normal.

    `terminal` is the time at which sampling takes its last step, to which its times are stretched; 0: where they fall.
    """

    times: Times = Times.logit_normal
    mean: float = 0.0
    std: float = 1.0
    terminal: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.terminal < 1:
            raise UsageError(
                f"model.objective.terminal={self.terminal:g} is no time before noise; type a number from 0 to below 1, such as 0.02"
            )
        if self.std <= 0:
            raise UsageError(f"model.objective.std={self.std:g} is no spread; type a number above 0, such as 1")

    def check(self, sample_steps: int) -> None:
        """Any number of steps draws."""

    def time(self, quantile: float, shift: float) -> float:
        """The time in (0, 1) below which this share of training times lies.

        Drawing a uniform quantile draws a training time; fixed quantiles give the times of the held-out loss. The shift
        s (Esser et al. 2024, eq. 23) moves times towards noise for larger pictures: t' = s t / (1 + (s - 1) t).
        """
        time = (
            quantile
            if self.times is Times.uniform
            else 1 / (1 + math.exp(-NormalDist(self.mean, self.std).inv_cdf(quantile)))
        )
        return shift * time / (1 + (shift - 1) * time)

    def unweighted(self) -> Flow:
        """The same where all times count alike, for losses that are compared between runs."""
        return self

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x_t for `clean`, `noise` (B, ...) and `time` (B,)."""
        time = time.view(-1, *[1] * (clean.dim() - 1))
        return (1 - time) * clean + time * noise

    def losses(
        self,
        prediction: torch.Tensor,
        clean: torch.Tensor,
        noise: torch.Tensor,
        time: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean squared error of each sample, (B,), in the type of `clean`: float32 in training. `weight` (B, 1, h, w) multiplies the errors."""
        errors = (prediction.to(clean.dtype) - (noise - clean)).square()
        return (errors if weight is None else errors * weight).flatten(1).mean(1)

    def sample(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        noise: torch.Tensor,
        steps: int,
        shift: float,
    ) -> torch.Tensor:
        """Euler steps from `noise` (B, ...) down to clean latents; the same times as diffusers' flow-match scheduler."""
        times = [shift * t / (1 + (shift - 1) * t) for t in ((steps - i) / steps for i in range(steps))]
        if self.terminal and steps > 1:
            stretch = (1 - self.terminal) / (1 - times[-1])
            times = [1 - (1 - time) * stretch for time in times]
        times.append(0.0)
        x = noise
        for now, later in pairwise(times):
            x = x + (later - now) * predict(x, x.new_full((x.shape[0],), now)).to(x.dtype)
        return x
