"""The VAE and the language model of a Z-Image checkpoint."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from trainer.model.encoders import Autoencoder
from trainer.model.pretrained import load_text_encoder
from trainer.model.qwen.chat import chat_text

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample
    from trainer.model.z_image import ZImage


class ZImageEncoder:
    """See `trainer.model.Encoder`."""

    def __init__(self, family: ZImage, device: torch.device):
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
        """Returns the tokens of the chat around the caption, (1, tokens), at most `text_length`.

        The pipeline pads them, and then leaves out the states of padding. Tokens do not attend to what follows.
        """
        text = chat_text(self._tokenizer, caption, thinking=True)
        length = self.family.text_length
        return self._tokenizer(text, max_length=length, truncation=True, return_tensors="pt").input_ids.to(self.device)

    @cached_property
    def _vae(self) -> Autoencoder:
        return Autoencoder(self.family, self.device)

    @cached_property
    def _language_model(self) -> Any:
        from transformers import Qwen3Model

        folder = self.family.component_folder("text_encoder")
        return load_text_encoder(Qwen3Model, folder, self.family.encoder_dtype_of("text_encoder").torch, self.device)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(self.family.component_folder("tokenizer"))
