"""The VAE and the language model of a Qwen-Image-Edit checkpoint."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from trainer.core.errors import DataError
from trainer.model.pretrained import load_text_encoder, load_vae, pixels_to_vae, vae_to_images
from trainer.model.qwen.template import IMAGE_TOKEN, SYSTEM_TOKENS, build_prompt
from trainer.model.qwen.vision import load_image_processor, vision_size

if TYPE_CHECKING:
    import numpy as np

    from trainer.dataset.transform import TransformedSample
    from trainer.model.qwen_image_edit import QwenImageEdit


class QwenEncoder:
    """See `trainer.model.Encoder`."""

    def __init__(self, family: QwenImageEdit, device: torch.device):
        self.family, self.folder, self.device = family, family.folder(), device
        self.dtype, self.vae_dtype = (family.encoder_dtype_of(name).torch for name in ("text_encoder", "vae"))

    @torch.no_grad()
    def encode(self, name: str, sample: TransformedSample) -> torch.Tensor:
        if name == "prompt":
            return self._prompt(sample).cpu()
        if name == "prompt_mask":
            return torch.ones(self.inputs(sample)["input_ids"].shape[1] - SYSTEM_TOKENS, dtype=torch.bool)
        return self._latents(sample.pixels("image" if name == "latents" else name)).cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._latent_statistics()
        # The VAE encodes videos: an image is a video of one frame.
        frames = latents[:, :, None].to(self.device, self.vae_dtype) * std + mean
        return vae_to_images(self._vae.decode(frames).sample[:, :, 0])

    def inputs(self, sample: TransformedSample) -> dict[str, torch.Tensor]:
        """Returns the language model's arguments: the tokens of the prompt and the patches of the control images.

        Raises errors.DataError if the instruction is too long.
        """
        tokenizer, processor = self._tokenizer, load_image_processor(self.folder / "processor")
        images = processor(
            [self._resize_for_vision(pixels) for pixels in sample.control_pixels()],
            input_data_format="channels_last",
            return_tensors="pt",
        )
        image_tokens = (images["image_grid_thw"].prod(1) // processor.merge_size**2).tolist()
        prompt = build_prompt(sample.caption, image_tokens, self.family.numbered)
        tokens = tokenizer(prompt, return_tensors="pt")
        length = tokens.input_ids.shape[1] - SYSTEM_TOKENS - sum(image_tokens)
        if length > self.family.text_length:
            raise DataError(
                f"sample {sample.sample.id}: its instruction has {length} tokens (with the template), and at most "
                f"{self.family.text_length} are read; shorten it, or type model.text_length={length}"
            )
        # The model was trained with token types. diffusers 0.42's pipelines leave them out, and transformers 5 then
        # mistakes positions in an image for positions in the text (github.com/huggingface/diffusers/issues/14194).
        token_types = (tokens.input_ids == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).int()
        return {**tokens, **images, "mm_token_type_ids": token_types}

    def _resize_for_vision(self, pixels: np.ndarray) -> np.ndarray:
        """Resizes a control image to the size at which the language model sees it, (H, W, 3)."""
        if self.family.vision_area is None:
            return pixels
        import numpy as np
        from diffusers.image_processor import VaeImageProcessor

        processor: Any = VaeImageProcessor()
        height, width = pixels.shape[:2]
        vision_width, vision_height = vision_size(height, width, self.family.vision_area)
        return np.asarray(processor.resize(processor.numpy_to_pil(pixels / 255)[0], vision_height, vision_width))

    def _prompt(self, sample: TransformedSample) -> torch.Tensor:
        inputs = {name: tensor.to(self.device) for name, tensor in self.inputs(sample).items()}
        return self._language_model(**inputs).last_hidden_state[0, SYSTEM_TOKENS:]

    def _latents(self, pixels: np.ndarray) -> torch.Tensor:
        frames = pixels_to_vae(pixels, self.vae_dtype, self.device)[:, :, None]
        mean, std = self._latent_statistics()
        return ((self._vae.encode(frames).latent_dist.mode() - mean) / std)[0, :, 0]

    def _latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mean and the standard deviation of each channel, (C, 1, 1, 1)."""
        mean, std = (
            torch.tensor(values).view(-1, 1, 1, 1).to(self.device, self.vae_dtype)
            for values in (self._vae.config.latents_mean, self._vae.config.latents_std)
        )
        return mean, std

    @cached_property
    def _vae(self) -> Any:
        from diffusers import AutoencoderKLQwenImage

        return load_vae(AutoencoderKLQwenImage, self.folder / "vae", self.vae_dtype, self.device)

    @cached_property
    def _language_model(self) -> Any:
        from transformers import Qwen2_5_VLForConditionalGeneration

        kind = Qwen2_5_VLForConditionalGeneration
        # `.model` leaves out the head, which would predict the next token.
        return load_text_encoder(kind, self.folder / "text_encoder", self.dtype, self.device).model

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(self.folder / "tokenizer")
