"""The dtypes of the frozen encoders of a family."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from trainer.core.dtypes import Dtype
from trainer.core.errors import UsageError
from trainer.model.single_file import TensorFile
from trainer.model.weights import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, ComponentWeights, required_tensors

if TYPE_CHECKING:
    from trainer.model import Family

LARGE_ENCODER_BYTES = 8 * 10**9
"""An encoder that takes more memory in float32 is worth a warning."""


def check_encoder_dtypes(dtypes: Mapping[str, Dtype], encoders: Collection[str]) -> None:
    """Raises errors.UsageError if `model.encoder_dtypes` names other components than these encoders."""
    unknown = [name for name in dtypes if name not in encoders]
    if unknown:
        known = f"its keys can be {', '.join(encoders)}" if encoders else "this model has none"
        raise UsageError(
            f"model.encoder_dtypes has {unknown[0]}, which is no encoder with a dtype of its own ({known}); type "
            "model.encoder_dtype=bfloat16 for all encoders"
        )


def encoder_warnings(family: Family) -> list[str]:
    """Returns a sentence for each encoder that takes much memory because it is loaded in float32.

    Reads only the headers of its files.
    """
    sizes = {
        name: 4 * _count_numbers(family, name)
        for name in family.encoders
        if family.encoder_dtype_of(name) is Dtype.float32
    }
    return [
        f"{name} takes {size / 10**9:.0f} GB in float32; type model.encoder_dtypes.{name}=bfloat16 for half of it"
        for name, size in sizes.items()
        if size > LARGE_ENCODER_BYTES
    ]


def _count_numbers(family: Family, component: str) -> int:
    """Returns how many floating-point numbers a component has; quantized weights are not counted."""
    if family.component_file(component) is not None:
        return sum(tensor.numel() for tensor in required_tensors(family.meta_component(component)).values())
    folder = family.component_folder(component)
    weights = [ComponentWeights(folder, name) for name in (DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS)]
    files = [TensorFile(path) for reader in weights for path in reader.files() if path.is_file()]
    return sum(
        math.prod(shape)
        for file in files
        for key, shape in file.shapes.items()
        if file.dtypes[key].startswith(("F", "BF"))
    )
