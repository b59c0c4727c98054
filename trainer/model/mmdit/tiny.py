"""Stable Diffusion 3 checkpoints with few layers and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.core.rng import normal
from trainer.model.pretrained import quiet_libraries
from trainer.model.tiny_components import (
    SEED,
    WORDS,
    build_vae,
    clip_config,
    save_clip_tokenizer,
    save_model_index,
    save_t5_tokenizer,
    t5_config,
)

CLIP_LENGTH, CLIP_WIDTH = 8, 16
T5_LENGTH, T5_WIDTH = 10, 40
"""T5's states are wider than those of both CLIP encoders, as in the published checkpoints."""


def save_tiny_checkpoint(folder: Path, with_t5: bool = True, **transformer: Any) -> None:
    """Writes a checkpoint with two blocks. The last keywords are arguments of the transformer.

    By default it is like Stable Diffusion 3.5 medium: with normalized queries and keys, and with a second attention in
    its first block.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    quiet_libraries()
    torch.manual_seed(SEED)
    for suffix in ("", "_2"):
        _save_clip(folder, suffix)
    if with_t5:
        _save_t5(folder)
    _save_transformer(folder, **transformer)
    vae = build_vae(
        (8, 8, 8, 8), use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.06
    )
    vae.save_pretrained(folder / "vae")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    clip = ("transformers", "CLIPTextModelWithProjection")
    save_model_index(
        folder,
        "StableDiffusion3Pipeline",
        {
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
            "text_encoder": clip,
            "text_encoder_2": clip,
            "text_encoder_3": ("transformers", "T5EncoderModel") if with_t5 else (None, None),
            "tokenizer": ("transformers", "CLIPTokenizer"),
            "tokenizer_2": ("transformers", "CLIPTokenizer"),
            "tokenizer_3": ("transformers", "T5Tokenizer") if with_t5 else (None, None),
            "transformer": ("diffusers", "SD3Transformer2DModel"),
            "vae": ("diffusers", "AutoencoderKL"),
            "image_encoder": (None, None),
            "feature_extractor": (None, None),
        },
    )


def _save_clip(folder: Path, suffix: str) -> None:
    from transformers import CLIPTextModelWithProjection

    vocabulary = save_clip_tokenizer(folder / f"tokenizer{suffix}", WORDS, CLIP_LENGTH)
    config = clip_config(vocabulary, CLIP_LENGTH, CLIP_WIDTH, intermediate_size=32, num_attention_heads=2)
    CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{suffix}")


def _save_t5(folder: Path) -> None:
    from transformers import T5EncoderModel

    vocabulary = save_t5_tokenizer(folder / "tokenizer_3", WORDS, T5_LENGTH)
    config = t5_config(vocabulary, T5_WIDTH, d_kv=16, d_ff=64, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")


def _save_transformer(folder: Path, **options: Any) -> None:
    from diffusers import SD3Transformer2DModel

    like_medium = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    transformer: Any = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=12,
        **(like_medium | options),
    )
    # Published files differ from what the network computes, so the file must count.
    positions = transformer.pos_embed.pos_embed
    positions += 0.1 * normal(tuple(positions.shape), "positions")
    transformer.save_pretrained(folder / "transformer")
