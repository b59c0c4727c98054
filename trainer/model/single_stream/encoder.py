"""The VAE and the language model of a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from trainer.model.encoders import Autoencoder
from trainer.model.pretrained import load_text_encoder

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample
    from trainer.model.single_stream.family import SingleStreamFamily


class SingleStreamEncoder(ABC):
    """Encodes a text as the states before the last layer of a language model; see `trainer.model.Encoder`."""

    def __init__(self, family: SingleStreamFamily, device: torch.device):
        self.family, self.device = family, device

    @property
    @abstractmethod
    def model_class(self) -> Any:
        """The class of the language model."""

    @abstractmethod
    def load_tokenizer(self) -> Any:
        """Returns the tokenizer."""

    @abstractmethod
    def full_text(self, caption: str) -> str:
        """Returns what the language model reads for a caption."""

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
        """Returns the tokens of a text, (1, tokens), at most `text_length`.

        The pipelines pad them at the end, and mask or leave out the padding. Tokens do not attend to what follows.
        """
        text, length = self.full_text(caption), self.family.text_length
        return self.tokenizer(text, max_length=length, truncation=True, return_tensors="pt").input_ids.to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        return self.load_tokenizer()

    @cached_property
    def _vae(self) -> Autoencoder:
        return Autoencoder(self.family, self.device)

    @cached_property
    def _language_model(self) -> Any:
        folder, dtype = self.family.component_folder("text_encoder"), self.family.encoder_dtype_of("text_encoder")
        return load_text_encoder(self.model_class, folder, dtype.torch, self.device)
