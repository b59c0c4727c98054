"""Names of tensors in the files that other programs read."""

from __future__ import annotations

TEXT_MODEL = "text_model."
"""Start of the names of CLIP's tensors in all published files; transformers 5 leaves it out in CLIPTextModel."""


def published_name(name: str) -> str:
    """Converts a text encoder's tensor name to its name in published files."""
    return name if name.startswith((TEXT_MODEL, "text_projection")) else TEXT_MODEL + name


def split_adapter_key(key: str) -> tuple[str, str]:
    """Splits `<layer>.lora_A.weight` into (`<layer>`, `lora_A.weight`), for the keys of any adapter."""
    kinds = (".lora_", ".alpha", ".dora_", ".lokr_", ".hada_", ".magnitude")
    at = next(key.rfind(kind) for kind in kinds if kind in key)
    return key[:at], key[at + 1 :]


def kohya_key(key: str, text_encoders: int) -> str:
    """Converts an adapter key that starts with its component to kohya's key, which ComfyUI and diffusers both read.

    The UNet's layers keep diffusers' numbering, which both understand too. `text_encoders` is the number of
    text encoders in the model: kohya's `te` is numbered only if there are several.
    """
    layer, tensor = split_adapter_key(key)
    component, _, layer = layer.partition(".")
    if component != "unet":
        layer = published_name(layer)
        number = component.removeprefix("text_encoder").removeprefix("_") or ("1" if text_encoders > 1 else "")
        component = f"te{number}"
    tensor = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}.get(tensor, tensor)
    return f"lora_{component}_{layer.replace('.', '_')}.{tensor}"
