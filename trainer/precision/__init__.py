"""How the frozen weights are stored, and in which type a step computes. What trains is kept in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError

if TYPE_CHECKING:
    import torch


class Storage(Enum):
    """Type of the frozen weights: torch's own names, and those of bitsandbytes. Below 16 bits only linear layers take it, and `keep_high` of
    the family does not."""

    fp32 = "float32"
    bf16 = "bfloat16"
    fp16 = "float16"
    fp8 = "float8_e4m3fn"
    int8 = "int8"
    nf4 = "nf4"
    fp4 = "fp4"
    native = "native"
    """As the checkpoint has them, which is quantised already."""

    @property
    def quantised(self) -> bool:
        """Whether only what is frozen can be stored so."""
        return self not in (Storage.fp32, Storage.bf16, Storage.fp16)

    @property
    def needs_bitsandbytes(self) -> bool:
        return self in (Storage.nf4, Storage.fp4)


class Compute(Enum):
    """Type of matrix products in a step: torch's own names."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(slots=True)
class Precision:
    storage: Storage = Storage.fp32
    compute: Compute = Compute.float32

    def dtype(self) -> torch.dtype:
        """The type in which weights are loaded, and which those keep that no smaller storage takes."""
        import torch

        return getattr(torch, self.compute.value if self.storage.quantised else self.storage.value)

    def check_types(self, types: dict[str, str]) -> None:
        """Raise errors.UsageError, with what to type, where a checkpoint whose tensors are of these types (safetensors' names) cannot be stored so."""
        kinds = set(kinds_of(types).values())
        others = sorted(types[name] for name in types if name.endswith(".weight") and types[name] not in PLAIN | FLOAT8)
        if len(others) > sum(kind in ("int8", "4-bit") for kind in kinds_of(types).values()):
            raise UsageError(
                f"the checkpoint's weights are quantised ({', '.join(sorted(set(others)))}) in a way that is not known here: float8, and "
                "bitsandbytes' 4-bit and 8-bit layers are; type another model.path"
            )
        if kinds and self.storage is not Storage.native:
            raise UsageError(
                f"precision={self.storage.name}: the checkpoint's weights are quantised already ({', '.join(sorted(kinds))}), and would lose "
                "once more; type precision=native, or the model.path of the weights they were made of"
            )
        if not kinds and self.storage is Storage.native:
            raise UsageError(
                "precision=native takes weights that are quantised already, and this checkpoint's are not; type precision=fp8 or nf4"
            )

    def stored(
        self, keep_high: tuple[str, ...], device: torch.device, types: dict[str, str] | None = None
    ) -> Callable | None:
        """What makes of a frozen linear layer without weights, while a network is read (see `trainer.model.filled`), one that stores them in
        fewer than 16 bits on `device`; None where nothing is. `types` are those of the tensors that are read, which decide where storage is
        native."""
        if not self.storage.quantised:
            return None
        if self.storage is Storage.native:
            from trainer.precision import native

            return native.maker(types, self.dtype(), device)
        from functools import partial

        from trainer.precision import eight_bit, four_bit
        from trainer.precision.linear import maker

        makes = {
            Storage.fp8: eight_bit.fp8,
            Storage.int8: eight_bit.int8,
            Storage.nf4: partial(four_bit.four_bit, kind="nf4"),
            Storage.fp4: partial(four_bit.four_bit, kind="fp4"),
        }
        return maker(makes[self.storage], keep_high, self.dtype(), device)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The context in which a network's forward pass runs."""
        import torch

        if self.compute is Compute.float32:
            return nullcontext()
        return torch.autocast(device.type, getattr(torch, self.compute.value))

    def loss_scale(self, state: dict[str, float] | None = None) -> LossScale | None:
        """What float16 products need, new or as a checkpoint's `vars` of it says; None for the other types."""
        return LossScale(**state or {}) if self.compute is Compute.float16 else None


@dataclass
class LossScale:
    """Gradients of float16 products vanish below 6e-8 and overflow above 65504, so the loss is scaled up for the backward pass (Micikevicius
    et al. 2018): by as much as the gradients just bear. Powers of two, so that scaling changes no digit. The numbers are torch's GradScaler's.
    """

    value: float = 2.0**16
    since: int = 0
    """Steps since the value last changed."""

    def follow(self, finite: bool) -> None:
        """Halve after gradients that overflowed, double after 2000 steps without."""
        self.since += 1
        if not finite:
            self.value, self.since = self.value / 2, 0
        elif self.since == 2000:
            self.value, self.since = self.value * 2, 0


PLAIN = {"F64", "F32", "F16", "BF16"}
FLOAT8 = {"F8_E4M3", "F8_E5M2"}


def kinds_of(types: dict[str, str]) -> dict[str, str]:
    """Layers of a checkpoint that are quantised -> how ("fp8", "int8", "4-bit"), told from the types of its tensors."""
    kinds = {}
    for key, kind in types.items():
        name, _, leaf = key.rpartition(".")
        if leaf == "weight" and kind in FLOAT8:
            kinds[name] = "fp8"
        elif leaf == "SCB" and types.get(f"{name}.weight") == "I8":
            kinds[name] = "int8"
        elif leaf in ("bitsandbytes__nf4", "bitsandbytes__fp4"):
            kinds[name.removesuffix(".weight.quant_state")] = "4-bit"
    return kinds


OPTIONS = dict.fromkeys(("fp32", "bf16", "fp16", "fp8", "int8", "nf4", "fp4", "native"), Precision)
