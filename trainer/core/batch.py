"""Examples (the named tensors of one sample) and the batches they are collated into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Example = dict[str, "torch.Tensor"]
"""Tensors of one sample, without a batch dimension."""
Batch = dict[str, "torch.Tensor"]
"""Tensors of several samples, each of shape (B, ...)."""

RESERVED = frozenset({"noise", "t", "mask", "weight", "loss_mask"})
"""Tensors that training adds to those of the model family."""
OBJECTIVE_KEYS = ("latents", "latents_std", *RESERVED)
"""Tensors that only the objective reads; all other tensors condition the network."""


def group_by_shape(examples: Sequence[Example], max_size: int) -> Iterator[list[int]]:
    """Yields the indices of examples in groups of at most `max_size` that `collate` can stack: those with images of the
    same size.
    """
    groups: dict[tuple, list[int]] = {}
    for index, example in enumerate(examples):
        shapes = tuple((name, example[name].shape[1:]) for name in sorted(example))
        groups.setdefault(shapes, []).append(index)
    for group in groups.values():
        yield from (group[start : start + max_size] for start in range(0, len(group), max_size))


def collate(examples: Sequence[Example]) -> Batch:
    """Returns the examples of one group as a batch.

    Sequences of different lengths are padded with zeros at the end of dimension 0.
    """
    import torch

    batch = {}
    for name in examples[0]:
        tensors = [example[name] for example in examples]
        if len({tensor.shape for tensor in tensors}) > 1:
            batch[name] = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        else:
            batch[name] = torch.stack(tensors)
    return batch


def get_conditions(example: Example) -> Example:
    """Returns the tensors of an example (or batch) that condition the network."""
    return {name: tensor for name, tensor in example.items() if name not in OBJECTIVE_KEYS}
