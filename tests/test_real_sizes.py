"""The published networks, built without weights: how many parameters train with the default targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config.groups import GROUPS
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters

CONFIGS = {
    "flux_kontext": ("transformer", {"guidance_embeds": True}),
    "sd15": ("unet", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "sdxl": (
        "unet",
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}
"""Denoiser, and the entries of its published config.json that differ from diffusers' defaults."""
COUNTS = {
    "flux_kontext": (11_901_408_320, 9_338_880, 190),
    # Published for this model at rank 8: 1,594,368 of 861,115,332.
    "sd15": (859_520_964, 1_594_368, 128),
    "sdxl": (2_567_463_684, 11_612_160, 560),
}
"""Parameters of the network, trainable parameters at rank 8, and adapted layers."""


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts_of_published_networks(name: str, tmp_path: Path):
    component, config = CONFIGS[name]
    (tmp_path / component).mkdir()
    (tmp_path / component / "config.json").write_text(json.dumps(config))
    family = GROUPS["model"][name](path=str(tmp_path))
    network = family.meta_model()
    total = sum(parameter.numel() for parameter in network.parameters())
    Lora(rank=8, alpha=8.0).attach(network, family.target_modules, seed=0)
    parameters = trainable_parameters(network)
    trainable = sum(parameter.numel() for parameter in parameters.values())
    assert (total, trainable, len(parameters) // 2) == COUNTS[name]
