"""Stable Diffusion 1.5 (Rombach et al. 2022): a UNet that reads the last hidden states of one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.model.unet.family import UNetFamily

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class SD15(UNetFamily):
    default_config = "stable-diffusion-v1-5/stable-diffusion-v1-5"

    @classmethod
    def text_encoder_class(cls, suffix: str) -> Any:
        from transformers import CLIPTextModel

        return CLIPTextModel

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline

    def encode_tokens(self, encoders: Sequence[Any], token_ids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"prompt": encoders[0](token_ids[0]).last_hidden_state}

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        from trainer.model.unet.tiny import save_tiny_checkpoint

        return save_tiny_checkpoint(folder, cls)
