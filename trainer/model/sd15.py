"""Stable Diffusion 1.5 (Rombach et al. 2022): a UNet that reads the last states of one CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.model.unet import UNet

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class SD15(UNet):
    @classmethod
    def text_class(cls, text: str) -> type:
        from transformers import CLIPTextModel

        return CLIPTextModel

    @classmethod
    def pipeline(cls) -> type:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline

    def read(self, encoders: Sequence[torch.nn.Module], tokens: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"prompt": encoders[0](tokens[0]).last_hidden_state}

    @classmethod
    def tiny(cls, folder: Path) -> list[str]:
        from trainer.model.unet.tiny import save

        save(folder, cls)
        return [f"model.path={folder}", "dataset.resolution=32"]
