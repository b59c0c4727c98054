"""Numeric precision: the type in which frozen weights are stored, and the type in which a step computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from trainer.core.dtypes import Dtype
from trainer.core.errors import UsageError
from trainer.core.settings import added
from trainer.precision.checkpoint_types import FLOAT8, UNQUANTIZED, quantized_layers
from trainer.precision.loss_scale import LossScale

if TYPE_CHECKING:
    import torch

    from trainer.precision.quantized_linear import QuantizeLayer


class Storage(Enum):
    """How frozen weights are stored, by the names of torch and bitsandbytes.

    Types below 16 bits are only for linear layers, except those in the `unquantized_modules` of the model.
    """

    fp32 = "float32"
    bf16 = "bfloat16"
    fp16 = "float16"
    fp8 = "float8_e4m3fn"
    int8 = "int8"
    nf4 = "nf4"
    fp4 = "fp4"
    native = "native"
    """The types of a checkpoint that is quantized already."""

    @property
    def is_quantized(self) -> bool:
        """Whether only frozen weights can have this type."""
        return self not in (Storage.fp32, Storage.bf16, Storage.fp16)

    @property
    def needs_bitsandbytes(self) -> bool:
        return self in (Storage.nf4, Storage.fp4)


@dataclass(slots=True)
class Precision:
    """Settings of the numeric precision."""

    storage: Storage = Storage.fp32
    """How frozen weights are stored."""
    compute: Dtype = Dtype.float32
    """Dtype of matrix products."""
    float8_products: bool = added(False)
    """Whether frozen layers multiply float8 numbers in the forward pass. The backward pass dequantizes weights."""

    def dtype(self) -> torch.dtype:
        """Returns the dtype of the weights that are not quantized."""
        import torch

        return self.compute.torch if self.storage.is_quantized else getattr(torch, self.storage.value)

    def check_checkpoint(self, tensor_dtypes: dict[str, str]) -> None:
        """Raises errors.UsageError, which says what to type, if a checkpoint cannot be stored in this precision.

        `tensor_dtypes` are the types of its tensors by safetensors' names for them.
        """
        kinds = list(quantized_layers(tensor_dtypes).values())
        unusual = sorted(
            dtype
            for name, dtype in tensor_dtypes.items()
            if name.endswith(".weight") and dtype not in UNQUANTIZED | FLOAT8
        )
        if len(unusual) > sum(kind in ("int8", "4-bit") for kind in kinds):
            raise UsageError(
                f"the checkpoint's weights are quantized ({', '.join(sorted(set(unusual)))}) in a way that is not "
                "supported: float8 and the 4-bit and 8-bit layers of bitsandbytes are; type a different model.path"
            )
        if kinds and self.storage is not Storage.native:
            raise UsageError(
                f"precision={self.storage.name}: the checkpoint's weights are quantized already "
                f"({', '.join(sorted(set(kinds)))}), and quantizing them again would lose more; "
                "type precision=native, or the model.path of the original weights"
            )
        if not kinds and self.storage is Storage.native:
            raise UsageError(
                "precision=native is for checkpoints that are quantized already, and the weights of this checkpoint "
                "are not; type precision=fp8 or nf4"
            )

    def quantizer(
        self, unquantized_modules: tuple[str, ...], device: torch.device, tensor_dtypes: dict[str, str] | None = None
    ) -> QuantizeLayer | None:
        """Returns the function that quantizes linear layers on `device` while a network is loaded; None if none are.

        It is the `quantize` argument of `trainer.model.weights.load_weights`. `tensor_dtypes` are the types of the
        checkpoint's tensors, which native storage needs.
        """
        if not self.storage.is_quantized:
            return None
        if self.storage is Storage.native:
            from trainer.precision.prequantized import checkpoint_quantizer

            assert tensor_dtypes is not None
            return checkpoint_quantizer(tensor_dtypes, self.dtype(), device)
        from trainer.precision import eight_bit, four_bit
        from trainer.precision.quantized_linear import linear_quantizer

        quantize_weight = {
            Storage.fp8: eight_bit.fp8_weight,
            Storage.int8: eight_bit.int8_weight,
            Storage.nf4: four_bit.nf4_weight,
            Storage.fp4: four_bit.fp4_weight,
        }[self.storage]
        multiply = eight_bit.multiply_fp8 if self.float8_products else None
        return linear_quantizer(quantize_weight, unquantized_modules, self.dtype(), device, multiply)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Returns the context of a network's forward pass."""
        import torch

        if self.compute is Dtype.float32:
            return nullcontext()
        return torch.autocast(device.type, self.compute.torch)

    def loss_scale(self, state: dict[str, float] | None = None) -> LossScale | None:
        """Returns a new loss scale, or one with the state of a checkpoint; None if products are not float16."""
        if self.compute is not Dtype.float16:
            return None
        return LossScale() if state is None else LossScale(state["value"], int(state["since"]))
