"""The key that names a cache entry, and the safetensors file that stores it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from trainer.core import documents
from trainer.core.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.dataset.transform import TransformedSample
    from trainer.model import Recipe

SCHEMA = 1
"""Increase this if images are decoded or resized differently, or if the file format changes: then all entries are
encoded again."""


def entry_key(name: str, recipe: Recipe, sample: TransformedSample) -> str:
    """Returns 64 hex digits, a hash of everything that determines the tensor `name` of the sample."""
    ingredients = [SCHEMA, name, recipe.digest, {field: sample.content_key(field) for field in recipe.fields}]
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def describe_source(recipe: Recipe, sample: TransformedSample) -> str:
    """Returns the names of the files and captions that an entry is made from, for messages."""
    return ", ".join(text for field in recipe.fields for text in sample.describe(field))


def serialize(name: str, key: str, source: str, tensor: Tensor) -> bytes:
    """Returns the content of an entry's file: the tensor as `value`, and a digest of it.

    Raises errors.DataError if the tensor is not finite.
    """
    import torch
    from safetensors.torch import save

    value = tensor.detach().to("cpu").contiguous()
    if not torch.isfinite(value).all():
        raise DataError(f"{source}: its {name} came out of the encoder as NaN or infinity")
    header = {"part": name, "key": key, "source": source}
    header["sha256"] = _digest(header, value)
    # Only one metadata value: safetensors writes several in random order, but equal entries should give equal files.
    return save({"value": value}, {"entry": json.dumps(header, sort_keys=True)})


def verify(name: str, key: str, value: Tensor, data: bytes) -> None:
    """Raises ValueError or KeyError unless `data`, which holds `value`, is what `serialize` returns for this entry."""
    import torch

    metadata = documents.parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    header = documents.parse_json(metadata["entry"])
    if (header["part"], header["key"]) != (name, key):
        raise ValueError("it belongs to a different entry")
    if header["sha256"] != _digest(header, value):
        raise ValueError("its digest does not match its content")
    if not torch.isfinite(value).all():
        raise ValueError("it holds NaN or infinity")


def _digest(header: dict[str, str], value: Tensor) -> str:
    """Returns the hex sha256 of an entry's name, key, source, dtype, shape and bytes."""
    import torch

    description = [header["part"], header["key"], header["source"], str(value.dtype), list(value.shape)]
    digest = hashlib.sha256(json.dumps(description).encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
