"""Recognizes checkpoints that are quantized, by the types of their tensors as safetensors names them."""

from __future__ import annotations

UNQUANTIZED = {"F64", "F32", "F16", "BF16"}
FLOAT8 = {"F8_E4M3", "F8_E5M2"}


def quantized_layers(tensor_dtypes: dict[str, str]) -> dict[str, str]:
    """Returns quantized layer -> kind of quantization: "fp8", "int8" or "4-bit"."""
    kinds = {}
    for name, dtype in tensor_dtypes.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and dtype in FLOAT8:
            kinds[layer] = "fp8"
        elif leaf == "SCB" and tensor_dtypes.get(f"{layer}.weight") == "I8":
            kinds[layer] = "int8"
        elif leaf in ("bitsandbytes__nf4", "bitsandbytes__fp4"):
            kinds[layer.removesuffix(".weight.quant_state")] = "4-bit"
    return kinds
