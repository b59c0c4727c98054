"""Tiny vision models of transformers with random weights, as folders on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.model.tiny_components import clip_config, save_clip_tokenizer


def save_tiny_clip(folder: Path) -> Path:
    """Saves a CLIP model with its processor for images of 32 px."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    words = save_clip_tokenizer(folder, ["red", "green", "blue"], 12)
    text = clip_config(words, 12, 16).to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    torch.manual_seed(0)
    model: Any = CLIPModel(config)
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor: Any = CLIPProcessor
    processor(CLIPImageProcessor(**sizes), CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder


def save_tiny_dino(folder: Path) -> Path:
    """Saves a DINOv2 model with its processor for images of 28 px."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, initializer_range=0.5
    )
    model: Any = Dinov2Model(config)
    model.save_pretrained(folder)
    processor: Any = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return folder
