"""Loading frozen components with diffusers and transformers, and the pixels that they read and write."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core import documents, files
from trainer.core.libraries import import_bitsandbytes
from trainer.model.weights import is_leftover, wrong_tensors

if TYPE_CHECKING:
    import numpy as np
    import torch


@cache
def quiet_libraries() -> None:
    """Turns off the progress bars and hints of diffusers and transformers; downloads keep their bars."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load_text_encoder(kind: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Returns a frozen model of the transformers class `kind`; its weights may be quantized by bitsandbytes."""
    quantization = documents.read_json(folder / "config.json").get("quantization_config", {})
    if quantization.get("quant_method") == "bitsandbytes":
        import_bitsandbytes()
    with files.library_errors(folder):
        model, report = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    _check_complete(folder, report)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights in the first pass on some CPUs, which fails for narrow layers.
            layer.support_avx512bf16_for_cpu = False
    return model.to(device).eval()


def load_vae(kind: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Returns a frozen autoencoder of the diffusers class `kind`."""
    with files.library_errors(folder):
        model, report = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True)
    _check_complete(folder, report)
    return model.to(device)


def _check_complete(folder: Path, report: Mapping[str, Any]) -> None:
    """Raises errors.DataError if a library filled missing weights with random numbers, or ignored some."""
    for kind, verb in (("missing_keys", "lack"), ("unexpected_keys", "also hold"), ("mismatched_keys", "misfit in")):
        keys = sorted(map(str, report.get(kind) or ()))
        if keys and kind != "unexpected_keys":
            raise wrong_tensors(folder, verb, keys)
        unknown = [key for key in keys if not is_leftover(key)]
        if unknown:
            raise wrong_tensors(folder, verb, unknown)


def pixels_to_vae(pixels: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Converts (H, W, 3) uint8 to (1, 3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None].to(dtype) / 127.5 - 1


def vae_to_images(output: torch.Tensor) -> torch.Tensor:
    """Converts (B, 3, H, W) in about [-1, 1] to float32 in [0, 1]."""
    return (output.float() / 2 + 0.5).clamp(0, 1)
