"""Soft prompt of a frozen language model that conditions a frozen denoiser (Shen et al. 2024, arXiv 2404.08677).

It has three parts: embeddings after the tokens of the text, keys and values before them in every layer (prefix tuning;
Li & Liang 2021), and a linear map from the last hidden states at the learned embeddings to the width of the denoiser's
cross-attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

INIT_STD = 0.02
"""Standard deviation of random initial values, as in the embeddings of LLaMA models (`initializer_range`)."""


@dataclass(slots=True, frozen=True)
class PromptSizes:
    """Sizes of the language model and the denoiser."""

    hidden: int
    """Width of the language model's hidden states."""
    layers: int
    """Number of its layers."""
    heads: int
    """Number of its heads for keys and values."""
    head: int
    """Entries of a key or value."""
    width: int
    """Width of the denoiser's cross-attention."""


class SoftPromptEncoder(torch.nn.Module):
    """Trainable parameters of a soft prompt.

    `tokens` is the number of learned embeddings, `prefix` that of learned keys and values, `projection` the width of
    the layers that compute the keys and values (None: they are parameters themselves), `token_std` the standard
    deviation of the initial embeddings.
    """

    def __init__(
        self, sizes: PromptSizes, tokens: int, prefix: int, projection: int | None, token_std: float = INIT_STD
    ):
        super().__init__()
        self.sizes = sizes
        self.tokens = torch.nn.Parameter(token_std * torch.randn(tokens, sizes.hidden))
        self.map = torch.nn.Linear(sizes.hidden, sizes.width)
        entries = sizes.layers * 2 * sizes.heads * sizes.head
        self.prefix = (
            torch.nn.Parameter(INIT_STD * torch.randn(prefix, sizes.hidden if projection else entries))
            if prefix
            else None
        )
        self.project = None
        if prefix and projection:
            self.project = torch.nn.Sequential(
                torch.nn.Linear(sizes.hidden, projection), torch.nn.Tanh(), torch.nn.Linear(projection, entries)
            )

    @property
    def length(self) -> int:
        """Number of positions of the prefix."""
        return 0 if self.prefix is None else len(self.prefix)

    def keys_and_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the prefix in each layer, both of shape (heads, positions, head)."""
        if self.prefix is None:
            return []
        flat = self.prefix if self.project is None else self.project(self.prefix)
        sizes = self.sizes
        layers = flat.view(self.length, sizes.layers, 2, sizes.heads, sizes.head).permute(1, 2, 3, 0, 4)
        return [(layer[0], layer[1]) for layer in layers]
