"""The VAE and the frozen text encoders of a checkpoint."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from trainer.core.errors import DataError
from trainer.model.pretrained import pixels_to_vae, vae_to_images

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample
    from trainer.model.unet.family import UNetFamily


class UNetEncoder:
    """See `trainer.model.Encoder`."""

    def __init__(self, family: UNetFamily, device: torch.device):
        self.family, self.device = family, device
        self.vae_dtype = family.vae_dtype.torch

    @torch.no_grad()
    def encode(self, name: str, sample: TransformedSample) -> torch.Tensor:
        if name in ("latents", "latents_std"):
            return self._latents(name, sample).cpu()
        if name.startswith("tokens"):
            return self.family.tokenize(name, sample.caption)
        if name == "time_ids":
            return torch.tensor(sample.geometry(), dtype=torch.float32)
        token_ids = [
            self.family.tokenize(f"tokens{suffix}", sample.caption)[None].to(self.device)
            for suffix in self.family.text_suffixes
        ]
        return self.family.encode_tokens(self._text_encoders, token_ids)[name][0].cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = latents.to(self.device, self.vae_dtype) / self._vae.config.scaling_factor
        return vae_to_images(self._check_finite(self._vae.decode(scaled).sample, "An image"))

    def _latents(self, name: str, sample: TransformedSample) -> torch.Tensor:
        """Returns the mean or the standard deviation of the latents, (C, h, w)."""
        distribution = self._vae.encode(pixels_to_vae(sample.pixels(), self.vae_dtype, self.device)).latent_dist
        values = distribution.mean if name == "latents" else distribution.std
        return self._check_finite(values[0], sample.sample.image.name) * self._vae.config.scaling_factor

    def _check_finite(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Returns the tensor, or raises errors.DataError: SDXL's published VAE overflows in float16."""
        if not torch.isfinite(tensor).all():
            remedy = "" if self.vae_dtype is torch.float32 else "; type model.vae_dtype=float32"
            raise DataError(f"{name} came out of the VAE as NaN or infinity in {self.family.vae_dtype.value}{remedy}")
        return tensor

    @cached_property
    def _vae(self) -> Any:
        vae = self.family.load_vae(self.vae_dtype, self.device)
        # One image at a time: at 1024 px each takes gigabytes.
        vae.enable_slicing()
        return vae

    @cached_property
    def _text_encoders(self) -> list[torch.nn.Module]:
        return [self.family.load_text_encoder(suffix, self.device) for suffix in self.family.text_suffixes]
