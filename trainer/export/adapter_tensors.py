"""The tensors of adapter files: their names, and the adapters that they make up."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from trainer.core.errors import DataError, UsageError
from trainer.method.layer_adapter import LayerAdapter

if TYPE_CHECKING:
    import torch

    from trainer.model.adapter_names import LayerRows

DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"
LYCORIS_MAGNITUDE = "dora_scale"
LEAVES = {
    **dict.fromkeys(
        (DOWN, "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight", "down.weight"), DOWN
    ),
    **dict.fromkeys((UP, "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight", "up.weight"), UP),
    **dict.fromkeys((MAGNITUDE, "lora_magnitude_vector"), MAGNITUDE),
    **{name: name for name in (LYCORIS_MAGNITUDE, "alpha")},
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
}
"""What the name of a tensor ends with, after the name of its layer -> the name that this program uses."""
_LONGEST_FIRST = sorted(LEAVES, key=len, reverse=True)
_FACTORS = (
    {DOWN, UP},
    {DOWN, UP, MAGNITUDE},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    *(
        {*first, *second}
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
)
"""The tensors of a complete adapter, of each kind."""


def split_key(key: str) -> tuple[str, str] | None:
    """Returns the layer's name in the file and the name of the tensor in `LEAVES`; None for other tensors."""
    # A checkpoint has the name of peft's adapter behind that of each tensor.
    plain = re.sub(r"\.default(?=\.weight$|$)", "", key)
    for leaf in _LONGEST_FIRST:
        if plain.endswith(f".{leaf}"):
            return plain.removesuffix(f".{leaf}"), LEAVES[leaf]
    return None


def group_keys(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Returns layer -> name of the tensor -> key, for the tensors of adapters, and the keys of all others.

    Raises errors.DataError if a tensor occurs under two names.
    """
    layers: dict[str, dict[str, str]] = {}
    others = []
    for key in sorted(keys):
        if (split := split_key(key)) is None:
            others.append(key)
            continue
        layer, leaf = split
        if leaf in (tensors := layers.setdefault(layer, {})):
            raise DataError(f"it holds the same tensor twice, as {tensors[leaf]} and {key}")
        tensors[leaf] = key
    return layers, others


def build_adapter(layer: str, tensors: dict[str, torch.Tensor]) -> tuple[LayerAdapter, float | None]:
    """Returns the adapter that the tensors of a layer make up, in float32 and with the scale 1, and its alpha.

    Raises errors.DataError if they do not belong together or are not finite, and errors.UsageError if the adapter is of
    a kind that this program does not train.
    """
    tensors = {leaf: _to_float32(layer, leaf, tensor) for leaf, tensor in tensors.items()}
    alpha = tensors.pop("alpha", None)
    if (scales := tensors.pop(LYCORIS_MAGNITUDE, None)) is not None:
        if MAGNITUDE in tensors:
            raise DataError(f"{layer} has the magnitudes of DoRA twice")
        tensors[MAGNITUDE] = _row_magnitudes(layer, scales)
    if set(tensors) == {*_FACTORS[2], MAGNITUDE} or (MAGNITUDE in tensors and any("lokr" in leaf for leaf in tensors)):
        raise UsageError(f"{layer} has the magnitudes of DoRA with LoHa or LoKr, which this program does not train")
    if set(tensors) not in _FACTORS:
        raise DataError(f"{layer} has only {', '.join(sorted(tensors)) or 'an alpha'}, which is no complete adapter")
    _check_shapes(layer, tensors)
    if MAGNITUDE in tensors:
        tensors[MAGNITUDE] = tensors[MAGNITUDE].flatten()
    if alpha is None:
        return LayerAdapter(tensors, 1.0), None
    if alpha.numel() != 1 or not float(alpha):
        raise DataError(f"{layer} has an alpha of {'0' if alpha.numel() == 1 else f'shape {tuple(alpha.shape)}'}")
    return LayerAdapter(tensors, 1.0), float(alpha)


def _to_float32(layer: str, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
    # Products of factors of 16 or 8 bits would be rounded.
    is_number = tensor.is_floating_point() or (leaf == "alpha" and not tensor.is_complex())
    try:
        converted = tensor.float() if is_number else None
    except (RuntimeError, NotImplementedError, TypeError):
        converted = None
    if converted is None:
        raise UsageError(
            f"{layer}.{leaf} has the type {str(tensor.dtype).removeprefix('torch.')}, which is not read; convert the "
            "file to bfloat16 or float32"
        )
    if not converted.isfinite().all():
        raise DataError(f"{layer}.{leaf} is not finite")
    return converted


def _row_magnitudes(layer: str, scales: torch.Tensor) -> torch.Tensor:
    """Returns LyCORIS's magnitudes of rows, (out, 1, ...), as peft's, (out,)."""
    if scales.ndim > 1 and scales.shape[0] == 1 and scales.numel() > 1:
        raise UsageError(
            f"{layer} has one magnitude for each column (dora_scale of shape {tuple(scales.shape)}); DoRA here has one "
            "for each row. Train it with wd_on_output=True (LyCORIS) to start from it"
        )
    return scales.flatten()


def _check_shapes(layer: str, tensors: dict[str, torch.Tensor]) -> None:
    """Raises errors.DataError if the factors cannot be multiplied."""
    shapes = {leaf: tuple(tensor.shape) for leaf, tensor in tensors.items()}
    pairs = [("lora_A.weight", "lora_B.weight")]
    pairs += [(f"{kind}_b", f"{kind}_a") for kind in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2")]
    fits = all(math.prod(shape) and len(shape) >= 2 for leaf, shape in shapes.items() if leaf != MAGNITUDE)
    fits = fits and all(
        shapes[first][0] == shapes[second][1] and len({len(shapes[first]), len(shapes[second])}) == 1
        for first, second in pairs
        if first in shapes
    )
    if fits and MAGNITUDE in shapes:
        fits = math.prod(shapes[MAGNITUDE]) == shapes[UP][0]
    if not fits:
        raise DataError(f"the shapes of {layer} do not belong together: {shapes}")


def split_rows(layer: str, adapter: LayerAdapter, parts: Sequence[LayerRows]) -> dict[str, LayerAdapter]:
    """Returns the adapters of the network's layers that a layer of a file holds, by their names.

    Raises errors.UsageError if the adapter cannot be taken apart.
    """
    if len(parts) == 1 and parts[0].of == 1:
        return {parts[0].layer: adapter}
    if adapter.method() == "lokr":
        raise UsageError(f"{layer} is a LoKr of several layers together, which cannot be taken apart")
    by_rows = [leaf for leaf in adapter.tensors if leaf in (UP, MAGNITUDE) or leaf.endswith("_a")]
    total = len(adapter.tensors[by_rows[0]])
    if total % parts[0].of:
        raise DataError(f"{layer} has {total} rows, which are not those of {', '.join(part.layer for part in parts)}")
    found = {}
    for part in parts:
        rows = slice(*(number * total // part.of for number in (part.first, part.last)))
        tensors = {leaf: tensor[rows] if leaf in by_rows else tensor for leaf, tensor in adapter.tensors.items()}
        found[part.layer] = LayerAdapter(tensors, adapter.scale)
    return _drop_zero_blocks(found)


def _drop_zero_blocks(adapters: dict[str, LayerAdapter]) -> dict[str, LayerAdapter]:
    """Removes the parts of the rank that belong to other layers, if each layer has a part of its own.

    kohya's scripts join the factors of several layers into a block-diagonal one of a multiple of the rank.
    """
    count = len(adapters)
    rank = next(iter(adapters.values())).rank()
    if rank is None or rank % count or any(DOWN not in adapter.tensors for adapter in adapters.values()):
        return adapters
    blocks = [slice(number * rank // count, (number + 1) * rank // count) for number in range(count)]
    for own, adapter in zip(blocks, adapters.values(), strict=True):
        up = adapter.tensors[UP]
        if any(up[:, block].any() for block in blocks if block != own):
            return adapters
    return {
        layer: LayerAdapter(
            adapter.tensors | {DOWN: adapter.tensors[DOWN][own], UP: adapter.tensors[UP][:, own]}, adapter.scale
        )
        for own, (layer, adapter) in zip(blocks, adapters.items(), strict=True)
    }
