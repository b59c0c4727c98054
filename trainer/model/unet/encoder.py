"""VAE and frozen text encoders of a checkpoint; see `trainer.model.Encoder`."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from trainer.core.errors import DataError

if TYPE_CHECKING:
    from trainer.dataset.view import TransformedSample
    from trainer.model.unet import UNet


class UNetEncoder:
    def __init__(self, family: UNet, device: torch.device):
        self.family, self.device = family, device
        self.dtype, self.vae_dtype = (getattr(torch, kind.value) for kind in (family.encoder_dtype, family.vae_dtype))

    @torch.no_grad()
    def encode(self, part: str, view: TransformedSample) -> torch.Tensor:
        if part in ("latents", "latents_std"):
            return self._latents(part, view).cpu()
        if part.startswith("tokens"):
            return self.family.tokens(part.removeprefix("tokens"), view.caption)
        if part == "time_ids":
            return torch.tensor(view.geometry(), dtype=torch.float32)
        tokens = [self.family.tokens(text, view.caption)[None].to(self.device) for text in self.family.texts]
        return self.family.read(self._text_encoders, tokens)[part][0].cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = self._vae.decode(latents.to(self.device, self.vae_dtype) / self._vae.config.scaling_factor).sample
        return (self._finite(images, "A picture").float() / 2 + 0.5).clamp(0, 1)

    def _latents(self, part: str, view: TransformedSample) -> torch.Tensor:
        pixels = torch.from_numpy(view.pixels()).to(self.device).permute(2, 0, 1)[None].to(self.vae_dtype) / 127.5 - 1
        posterior = self._vae.encode(pixels).latent_dist
        found = posterior.mean if part == "latents" else posterior.std
        return self._finite(found[0], view.sample.image.name) * self._vae.config.scaling_factor

    def _finite(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if not torch.isfinite(tensor).all():
            # The published VAE of the larger model overflows in float16.
            remedy = "" if self.vae_dtype is torch.float32 else "; type model.vae_dtype=float32"
            raise DataError(
                f"{name} came out of the VAE as NaN or infinity in {str(self.vae_dtype).removeprefix('torch.')}{remedy}"
            )
        return tensor

    @cached_property
    def _vae(self) -> torch.nn.Module:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(
            self.family.component("vae"), torch_dtype=self.vae_dtype, use_safetensors=True
        )
        # Picture by picture: at 1024 px each takes gigabytes.
        vae.enable_slicing()
        return vae.to(self.device)

    @cached_property
    def _text_encoders(self) -> list[torch.nn.Module]:
        return [self.family.text_encoder(text, self.dtype).to(self.device).eval() for text in self.family.texts]
