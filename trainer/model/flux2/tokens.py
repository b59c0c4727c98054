"""Positions of tokens, and the shift of the sampling times, of FLUX.2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CONTROL_STEP = 10
"""Distance between two images along the first axis of the positions."""
MANY_STEPS = 200
"""Sampling steps whose shift is the one in training, and that of large images with any number of steps."""
LARGE = 4300
"""Tokens above which the shift does not depend on the number of steps."""


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) -> tokens (B, h w, C)."""
    return latents.flatten(2).transpose(1, 2)


def image_positions(latents: torch.Tensor, image: int) -> torch.Tensor:
    """Returns (image, row, column, 0) of each token, (h w, 4).

    `image` is 0 for the target, and 1, 2, ... for the control images.
    """
    import torch

    height, width = latents.shape[2:]
    axes = ([CONTROL_STEP * image], range(height), range(width), [0])
    return torch.cartesian_prod(*(torch.tensor([*axis], device=latents.device) for axis in axes))


def text_positions(length: int, device: torch.device) -> torch.Tensor:
    """Returns (0, 0, 0, i) of each token of the prompt, (length, 4)."""
    import torch

    positions = torch.zeros(length, 4, dtype=torch.long, device=device)
    positions[:, 3] = torch.arange(length, device=device)
    return positions


def empirical_shift(scheduler: Mapping[str, Any], tokens: int, steps: int | None) -> float:
    """Returns the shift of the times for images of this many tokens, from a scheduler's config.

    With `use_dynamic_shifting` it is exp(mu), or mu itself if `time_shift_type` is linear, where mu is that of
    diffusers' `compute_empirical_mu`: a line through two numbers of steps, each linear in the number of tokens.
    """
    if not scheduler.get("use_dynamic_shifting", False):
        return scheduler.get("shift", 1.0)
    many = 0.00016927 * tokens + 0.45666666
    few = 8.73809524e-05 * tokens + 1.89833333
    mu = many
    if tokens <= LARGE and steps is not None:
        slope = (many - few) / (MANY_STEPS - 10)
        mu = slope * steps + many - MANY_STEPS * slope
    return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)
