"""Prompts of a batch as the transformer reads them."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor


def cut_padding(prompts: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Returns the prompts (B, tokens, C) without padding, where the mask (B, tokens) is False.

    The forecast of memory runs on tensors that have no values; there, all prompts have the full length.
    """
    if isinstance(mask, FakeTensor):
        return list(prompts)
    return [prompt[:length] for prompt, length in zip(prompts, mask.bool().sum(1).tolist(), strict=True)]
