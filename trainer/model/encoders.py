"""Frozen components that several families have: an autoencoder of images, and CLIP and T5 with their tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer.model.pretrained import load_text_encoder, load_vae, pixels_to_vae, vae_to_images

if TYPE_CHECKING:
    import numpy as np

    from trainer.model import Family


class Autoencoder:
    """The AutoencoderKL of a checkpoint, whose latents are shifted and then scaled (Esser et al. 2024)."""

    def __init__(self, family: Family, device: torch.device):
        from diffusers import AutoencoderKL

        self.device, self.dtype = device, family.encoder_dtype_of("vae").torch
        self.model = load_vae(AutoencoderKL, family.component_folder("vae"), self.dtype, device)

    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        """Image (H, W, 3), uint8 -> latents (C, h, w): the mode of the distribution that the VAE gives."""
        config = self.model.config
        latents = self.model.encode(pixels_to_vae(pixels, self.dtype, self.device)).latent_dist.mode()[0]
        return (latents - config.shift_factor) * config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32."""
        config = self.model.config
        scaled = latents.to(self.device, self.dtype) / config.scaling_factor + config.shift_factor
        return vae_to_images(self.model.decode(scaled).sample)


class TextEncoder:
    """A text encoder of a checkpoint and its tokenizer. See `load_clip` and `load_t5`."""

    def __init__(self, family: Family, suffix: str, kind: Any, tokenizer: Any, device: torch.device):
        """Loads `text_encoder<suffix>` as the class `kind`, and `tokenizer<suffix>`."""
        component = f"text_encoder{suffix}"
        self.device, dtype = device, family.encoder_dtype_of(component).torch
        self.model = load_text_encoder(kind, family.component_folder(component), dtype, device)
        self.tokenizer = tokenizer.from_pretrained(family.component_folder(f"tokenizer{suffix}"))

    def __call__(self, caption: str, length: int | None = None, **options: Any) -> Any:
        """Returns the model's output for a caption that is padded or cut to `length` tokens.

        The default is the longest text that the tokenizer allows. The model sees no padding mask.
        """
        length = self.tokenizer.model_max_length if length is None else length
        tokens = self.tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.model(tokens.input_ids.to(self.device), **options)


def load_clip(family: Family, suffix: str, device: torch.device, projection: bool = False) -> TextEncoder:
    """Returns a CLIP text encoder, with the projection of its pooled output if asked for."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return TextEncoder(family, suffix, kind, CLIPTokenizer, device)


def load_t5(family: Family, suffix: str, device: torch.device) -> TextEncoder:
    """Returns a T5 encoder."""
    from transformers import T5EncoderModel, T5Tokenizer

    return TextEncoder(family, suffix, T5EncoderModel, T5Tokenizer, device)


def count_tokens(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """Returns the number of tokens of each caption, uncut."""
    return [len(tokenizer(caption, verbose=False).input_ids) for caption in captions]
