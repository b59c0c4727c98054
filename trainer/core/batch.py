"""Rows, the named tensors of one sample, and the batches that are made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Example = dict[str, "torch.Tensor"]


def chunks(rows: Sequence[Example], at_most: int) -> Iterator[list[int]]:
    """The indices of the rows in groups of at most so many that `collate` can join: those of one size of pictures."""
    groups: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(tuple((name, row[name].shape[1:]) for name in sorted(row)), []).append(index)
    for group in groups.values():
        yield from (group[start : start + at_most] for start in range(0, len(group), at_most))


def collate(rows: Sequence[Example]) -> Example:
    """Rows of one group -> one row of tensors (B, ...); what is of several lengths (dimension 0 only) is filled up with zeros behind."""
    import torch

    batch = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        if len({tensor.shape for tensor in tensors}) > 1:
            batch[name] = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        else:
            batch[name] = torch.stack(tensors)
    return batch


def conditions(row: Example) -> Example:
    """A row less what the objective takes from it: what the network is told of the sample."""
    return {name: tensor for name, tensor in row.items() if name not in OBJECTIVE}


OBJECTIVE = ("latents", "latents_std", "noise", "time", "mask", "weight", "counts")
