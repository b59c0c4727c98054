"""Soft prompts for a frozen language model that writes the condition of a frozen denoiser (Shen et al. 2024, arXiv 2404.08677).

Three things train: embeddings that stand behind the tokens of the text, keys and values that stand before them in every layer (prefix tuning;
Li & Liang 2021), and a linear map from the last hidden states at the learnt positions to the width of the denoiser's cross-attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SPREAD = 0.02
"""Standard deviation of what begins at random, as that of the embeddings of LLaMA's family (`initializer_range`)."""


@dataclass(slots=True, frozen=True)
class Reader:
    """The sizes of a language model, and `width`, the size of a token of what is made for the denoiser."""

    hidden: int
    layers: int
    heads: int
    """Of keys and values."""
    head: int
    """Entries of a key or value."""
    width: int


class SoftPrompt(torch.nn.Module):
    """`tokens` (n, hidden), `map` (hidden -> width), and the prefix: as it is, or through two layers where `projection` (their width) is given."""

    def __init__(self, reader: Reader, tokens: int, prefix: int, projection: int | None):
        super().__init__()
        self.reader = reader
        self.tokens = torch.nn.Parameter(SPREAD * torch.randn(tokens, reader.hidden))
        self.map = torch.nn.Linear(reader.hidden, reader.width)
        entries = reader.layers * 2 * reader.heads * reader.head
        self.prefix = (
            torch.nn.Parameter(SPREAD * torch.randn(prefix, reader.hidden if projection else entries))
            if prefix
            else None
        )
        self.project = None
        if prefix and projection:
            self.project = torch.nn.Sequential(
                torch.nn.Linear(reader.hidden, projection), torch.nn.Tanh(), torch.nn.Linear(projection, entries)
            )

    @property
    def length(self) -> int:
        """Positions of the prefix."""
        return 0 if self.prefix is None else len(self.prefix)

    def keys_and_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer the prefix's keys and values, (heads, positions, head) both."""
        if self.prefix is None:
            return []
        flat = self.prefix if self.project is None else self.project(self.prefix)
        reader = self.reader
        layers = flat.view(self.length, reader.layers, 2, reader.heads, reader.head).permute(1, 2, 3, 0, 4)
        return [(layer[0], layer[1]) for layer in layers]
