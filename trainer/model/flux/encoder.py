"""The VAE, CLIP and T5 of a FLUX checkpoint."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.model.pretrained import load_text_encoder, load_vae, pixels_to_vae, vae_to_images

if TYPE_CHECKING:
    import numpy as np

    from trainer.dataset.transform import TransformedSample


class FluxEncoder:
    """See `trainer.model.Encoder`."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, text_length: int):
        self.folder, self.device, self.dtype, self.text_length = folder, device, dtype, text_length

    @torch.no_grad()
    def encode(self, name: str, sample: TransformedSample) -> torch.Tensor:
        if name == "prompt":
            return self._prompt(sample.caption).cpu()
        if name == "pooled":
            return self._pooled(sample.caption).cpu()
        return self._latents(sample.pixels("image" if name == "latents" else name)).cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._vae.config
        scaled = latents.to(self.device, self.dtype) / config.scaling_factor + config.shift_factor
        return vae_to_images(self._vae.decode(scaled).sample)

    def _latents(self, pixels: np.ndarray) -> torch.Tensor:
        config = self._vae.config
        latents = self._vae.encode(pixels_to_vae(pixels, self.dtype, self.device)).latent_dist.mode()[0]
        return (latents - config.shift_factor) * config.scaling_factor

    def _prompt(self, caption: str) -> torch.Tensor:
        tokenizer, model = self._t5
        return model(self._token_ids(tokenizer, caption, self.text_length)).last_hidden_state[0]

    def _pooled(self, caption: str) -> torch.Tensor:
        tokenizer, model = self._clip
        return model(self._token_ids(tokenizer, caption, tokenizer.model_max_length)).pooler_output[0]

    def _token_ids(self, tokenizer: Any, caption: str, length: int) -> torch.Tensor:
        tokens = tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.device)

    @cached_property
    def _vae(self) -> Any:
        from diffusers import AutoencoderKL

        return load_vae(AutoencoderKL, self.folder / "vae", self.dtype, self.device)

    @cached_property
    def _clip(self) -> tuple[Any, Any]:
        from transformers import CLIPTextModel, CLIPTokenizer

        model = load_text_encoder(CLIPTextModel, self.folder / "text_encoder", self.dtype, self.device)
        return CLIPTokenizer.from_pretrained(self.folder / "tokenizer"), model

    @cached_property
    def _t5(self) -> tuple[Any, Any]:
        from transformers import T5EncoderModel, T5Tokenizer

        model = load_text_encoder(T5EncoderModel, self.folder / "text_encoder_2", self.dtype, self.device)
        return T5Tokenizer.from_pretrained(self.folder / "tokenizer_2"), model
