"""Target and control latents as the tokens of a flow transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.dataset.sample import control_names

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch

PATCH = 2
"""Side of a token in latent pixels."""


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) -> tokens (B, h/2 * w/2, 4 C)."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens (B, h/2 * w/2, 4 C) -> latents (B, C, h, w)."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def position_ids(latents: torch.Tensor, image: int) -> torch.Tensor:
    """Returns (image, row, column) of each token, (tokens, 3), in the dtype of the latents.

    `image` is 0 for the target and 1, 2, ... for the control images (section 3 of the paper). The transformer accepts
    any value, so a wrong one goes unnoticed.
    """
    import torch

    height, width = (side // PATCH for side in latents.shape[2:])
    rows, columns = torch.arange(height, device=latents.device), torch.arange(width, device=latents.device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2).to(latents.dtype)
    return torch.cat([grid.new_full((len(grid), 1), image), grid], 1)


def resolution_shift(scheduler: Mapping[str, Any], height: int, width: int) -> float:
    """Returns the shift of the times for latents of this size, from a scheduler's config.

    With `use_dynamic_shifting` it is exp(mu), or mu itself if `time_shift_type` is linear, where mu is linear in the
    number of tokens (diffusers' `calculate_shift`); otherwise it is the same for all sizes.
    """
    if not scheduler.get("use_dynamic_shifting", False):
        return scheduler.get("shift", 1.0)
    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    config = defaults | dict(scheduler)
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    mu = config["base_shift"] + slope * (height * width / PATCH**2 - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def latent_shapes(
    channels: int, scale: int, size: tuple[int, int], control_sizes: Sequence[tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the latents of the target (`latents`) and of the control images, by name.

    Sizes are (height, width) in pixels; `scale` is the number of pixels per latent pixel, along one side.
    """
    names = ("latents", *control_names(len(control_sizes)))
    return {
        name: (channels, height // scale, width // scale)
        for name, (height, width) in zip(names, (size, *control_sizes), strict=True)
    }


def control_latents(conditions: Batch, dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns the latents of the control images, in order.

    Latents may be cached in bfloat16, which autocast to float16 does not convert when tokens are concatenated.
    """
    return [conditions[name].to(dtype) for name in control_names(len(conditions)) if name in conditions]
