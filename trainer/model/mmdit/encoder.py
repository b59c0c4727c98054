"""The VAE, the two CLIP encoders and the T5 encoder of a Stable Diffusion 3 checkpoint."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from trainer.model.encoders import Autoencoder, TextEncoder, load_clip, load_t5

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample
    from trainer.model.sd3 import SD3


class SD3Encoder:
    """See `trainer.model.Encoder`."""

    def __init__(self, family: SD3, device: torch.device):
        self.family, self.device = family, device

    @torch.no_grad()
    def encode(self, name: str, sample: TransformedSample) -> torch.Tensor:
        if name == "latents":
            return self._vae.encode(sample.pixels()).cpu()
        if name == "prompt":
            return self._t5(sample.caption, self.family.text_length).last_hidden_state[0].cpu()
        # The pipeline cuts captions for both to the length of the first.
        length = self._clips[0].tokenizer.model_max_length
        outputs = [clip(sample.caption, length, output_hidden_states=True) for clip in self._clips]
        if name == "pooled":
            return torch.cat([output.text_embeds[0] for output in outputs]).cpu()
        return torch.cat([output.hidden_states[-2][0] for output in outputs], -1).cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._vae.decode(latents)

    @cached_property
    def _vae(self) -> Autoencoder:
        return Autoencoder(self.family, self.device)

    @cached_property
    def _clips(self) -> list[TextEncoder]:
        return [load_clip(self.family, suffix, self.device, projection=True) for suffix in ("", "_2")]

    @cached_property
    def _t5(self) -> TextEncoder:
        return load_t5(self.family, "_3", self.device)
