"""The VAE and the language model of a FLUX.2 [klein] checkpoint."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from trainer.model.pretrained import load_text_encoder, load_vae, pixels_to_vae, vae_to_images
from trainer.model.qwen.chat import chat_text

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample
    from trainer.model.flux2_klein import Flux2Klein


class Flux2Encoder:
    """See `trainer.model.Encoder`."""

    def __init__(self, family: Flux2Klein, device: torch.device):
        self.family, self.device = family, device
        self.dtype, self.vae_dtype = (family.encoder_dtype_of(name).torch for name in ("text_encoder", "vae"))

    @torch.no_grad()
    def encode(self, name: str, sample: TransformedSample) -> torch.Tensor:
        if name == "prompt":
            return self._prompt(sample.caption).cpu()
        pixels = pixels_to_vae(sample.pixels("image" if name == "latents" else name), self.vae_dtype, self.device)
        latents = torch.nn.functional.pixel_unshuffle(self._vae.encode(pixels).latent_dist.mode(), 2)
        mean, std = self._statistics()
        return ((latents - mean) / std)[0].cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics()
        latents = latents.to(self.device, self.vae_dtype) * std + mean
        return vae_to_images(self._vae.decode(torch.nn.functional.pixel_shuffle(latents, 2)).sample)

    def _prompt(self, caption: str) -> torch.Tensor:
        """Returns the states of the `text_layers`, side by side, (text_length, layers x width).

        The language model does not attend to padding, but the states of padding belong to the prompt.
        """
        inputs = self._tokenizer(
            chat_text(self._tokenizer, caption, thinking=False),
            padding="max_length",
            max_length=self.family.text_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        output = self._language_model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
        )
        return torch.cat([output.hidden_states[layer][0] for layer in self.family.text_layers], -1)

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mean and the standard deviation of each channel of the latents, (1, C, 1, 1)."""
        norm = self._vae.bn
        mean, variance = (tensor.view(1, -1, 1, 1) for tensor in (norm.running_mean, norm.running_var))
        return mean, (variance + self._vae.config.batch_norm_eps).sqrt()

    @cached_property
    def _vae(self) -> Any:
        from diffusers import AutoencoderKLFlux2

        return load_vae(AutoencoderKLFlux2, self.family.component_folder("vae"), self.vae_dtype, self.device)

    @cached_property
    def _language_model(self) -> Any:
        from transformers import Qwen3ForCausalLM

        folder = self.family.component_folder("text_encoder")
        # `.model` leaves out the head, which would predict the next token.
        return load_text_encoder(Qwen3ForCausalLM, folder, self.dtype, self.device).model

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(self.family.component_folder("tokenizer"))
