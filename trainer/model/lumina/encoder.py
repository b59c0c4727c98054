"""The VAE and the language model of a Lumina Image 2.0 checkpoint."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from trainer.model.encoders import Autoencoder
from trainer.model.lumina.prompt import prompt_text
from trainer.model.pretrained import load_text_encoder

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample
    from trainer.model.lumina2 import Lumina2


class Lumina2Encoder:
    """See `trainer.model.Encoder`."""

    def __init__(self, family: Lumina2, device: torch.device):
        self.family, self.device = family, device

    @torch.no_grad()
    def encode(self, name: str, sample: TransformedSample) -> torch.Tensor:
        if name == "latents":
            return self._vae.encode(sample.pixels("image")).cpu()
        tokens = self._tokens(sample.caption)
        if name == "prompt_mask":
            return torch.ones(tokens.shape[1], dtype=torch.bool)
        states = self._language_model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        return states[-2][0].cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._vae.decode(latents)

    def _tokens(self, caption: str) -> torch.Tensor:
        """Returns the tokens of a prompt, (1, tokens), at most `text_length`.

        The pipeline pads them at the end and masks the padding. Tokens do not attend to what follows.
        """
        text, length = prompt_text(caption), self.family.text_length
        return self._tokenizer(text, max_length=length, truncation=True, return_tensors="pt").input_ids.to(self.device)

    @cached_property
    def _vae(self) -> Autoencoder:
        return Autoencoder(self.family, self.device)

    @cached_property
    def _language_model(self) -> Any:
        from transformers import Gemma2Model

        folder = self.family.component_folder("text_encoder")
        return load_text_encoder(Gemma2Model, folder, self.family.encoder_dtype_of("text_encoder").torch, self.device)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import GemmaTokenizer

        return GemmaTokenizer.from_pretrained(self.family.component_folder("tokenizer"))
