"""The VAE, CLIP and T5 of a FLUX checkpoint."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from trainer.model.encoders import Autoencoder, TextEncoder, load_clip, load_t5

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample
    from trainer.model.flux.family import FluxFamily


class FluxEncoder:
    """See `trainer.model.Encoder`."""

    def __init__(self, family: FluxFamily, device: torch.device):
        self.family, self.device = family, device

    @torch.no_grad()
    def encode(self, name: str, sample: TransformedSample) -> torch.Tensor:
        if name == "prompt":
            return self._t5(sample.caption, self.family.text_length).last_hidden_state[0].cpu()
        if name == "pooled":
            return self._clip(sample.caption).pooler_output[0].cpu()
        return self._vae.encode(sample.pixels("image" if name == "latents" else name)).cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._vae.decode(latents)

    @cached_property
    def _vae(self) -> Autoencoder:
        return Autoencoder(self.family, self.device)

    @cached_property
    def _clip(self) -> TextEncoder:
        return load_clip(self.family, "", self.device)

    @cached_property
    def _t5(self) -> TextEncoder:
        return load_t5(self.family, "_2", self.device)
