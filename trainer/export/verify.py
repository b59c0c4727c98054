"""Compares exports with the trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.core.errors import DataError

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest error of a layer's probe outputs that rounding explains, relative to their norm."""
MIN_PRESERVED = {torch.float32: 0.99, torch.bfloat16: 0.9, torch.float16: 0.9}
"""Smallest fraction of the trained change that a checkpoint must preserve.

The fraction is <written - before, after - before> / |after - before|^2. bfloat16 rounds away a change smaller
than 1/512 of a weight.
"""


class WeightChange(NamedTuple):
    """A tensor of the network before and after training, both in float32."""

    name: str
    before: torch.Tensor
    after: torch.Tensor


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor in another dtype, unless it holds whole numbers."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def dtype_name(dtype: torch.dtype) -> str:
    """Returns "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def compare_adapters(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], dtype: torch.dtype, path: Path
) -> None:
    """Compares the probe outputs, layer -> tensor, of the trained adapter and of the one that was written as `dtype`.

    `path` is the name of the export. Raises errors.DataError if they differ by more than rounding explains.
    """
    wrong = sorted(expected.keys() ^ found.keys())
    for layer in expected.keys() & found.keys():
        error = (found[layer] - expected[layer].cpu()).norm()
        # Not `error > ...`, which is false for NaN.
        if not error <= ROUNDING[dtype] * expected[layer].norm().cpu():
            wrong.append(layer)
    if wrong:
        raise DataError(
            f"{path} was written and read back, and differs from the trained adapter in {len(wrong)} of "
            f"{len(expected)} layers ({', '.join(wrong[:3])}). It was discarded; try export.dtype=float32, and please "
            "report this"
        )


def check_checkpoint(
    read: Callable[[str], torch.Tensor],
    changes: Iterable[WeightChange],
    expected: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    path: Path,
) -> float:
    """Compares the tensors of a written checkpoint, which `read` returns by name, with the trained ones.

    `expected` has their shapes, on the meta device; `dtype` is that of all but whole numbers. Returns the fraction of
    the trained change that rounding to `dtype` preserves, see MIN_PRESERVED. `path` is the name of the export.

    Raises errors.DataError if that fraction is too small, if nothing was trained, or if a tensor differs.
    """
    limits = torch.finfo(dtype)
    wrong: list[str] = []
    trained, preserved = 0.0, 0.0
    for name, before, after in changes:
        written = read(name)
        if written.shape != expected[name].shape or written.dtype != cast(expected[name], dtype).dtype:
            wrong.append(name)
            continue
        written = written.to(after.device).float()
        atol = max(limits.tiny, 1e-6 * after.abs().max().item())
        if not torch.allclose(written, after, rtol=max(limits.eps, 1e-5), atol=atol):
            wrong.append(name)
        change = after - before
        trained += change.square().sum().item()
        preserved += (change * (written - before)).sum().item()
    if wrong:
        raise DataError(
            f"{path} was written and read back, and differs from the trained weights in {len(wrong)} of "
            f"{len(expected)} tensors ({', '.join(wrong[:3])}). It was discarded; try export.dtype=float32, and please "
            "report this"
        )
    if not trained:
        raise DataError(
            f"{path} would equal the checkpoint that training started from: nothing has changed. It was discarded"
        )
    # Not `preserved < ...`, which is false for NaN.
    if not preserved >= MIN_PRESERVED[dtype] * trained:
        raise DataError(
            f"{path}: {dtype_name(dtype)} would preserve only {max(0.0, preserved / trained):.0%} of the trained "
            "change and round the rest away. It was discarded; type export.dtype=float32"
        )
    return preserved / trained
