"""Writes checkpoint folders in the layout of FLUX, with small components."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.core.rng import seed_for
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


def save_tiny_checkpoint(folder: Path, pipeline: str, text_length: int = 8) -> None:
    """Writes a checkpoint for this diffusers pipeline with one block of each kind and random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(SEED)
    vae = build_vae(
        (8, 8, 8, 8), use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.11
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    save_checkpoint(folder, vae, transformer, WORDS, text_length=text_length, text_width=16, pipeline=pipeline)


def save_checkpoint(
    folder: Path,
    vae: Any,
    transformer: Any,
    words: Sequence[str],
    *,
    text_length: int,
    text_width: int,
    pipeline: str = "FluxKontextPipeline",
) -> None:
    """Writes a checkpoint with this VAE and (in bfloat16) this transformer, and with random text encoders.

    `words` become tokens of their own.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    quiet_libraries()
    vocabularies = save_tokenizers(folder, words, text_length)
    save_text_encoders(folder, *vocabularies, text_length, text_width)
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    vae.eval().save_pretrained(folder / "vae")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    save_model_index(
        folder,
        pipeline,
        {
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
            "text_encoder": ("transformers", "CLIPTextModel"),
            "text_encoder_2": ("transformers", "T5EncoderModel"),
            "tokenizer": ("transformers", "CLIPTokenizer"),
            "tokenizer_2": ("transformers", "T5Tokenizer"),
            "transformer": ("diffusers", "FluxTransformer2DModel"),
            "vae": ("diffusers", "AutoencoderKL"),
            "image_encoder": (None, None),
            "feature_extractor": (None, None),
        },
    )


def save_tokenizers(folder: Path, words: Sequence[str], length: int) -> tuple[int, int]:
    """Writes the CLIP and the T5 tokenizer; returns the sizes of their vocabularies."""
    return (
        save_clip_tokenizer(folder / "tokenizer", words, length),
        save_t5_tokenizer(folder / "tokenizer_2", words, length),
    )


def save_text_encoders(folder: Path, clip_vocabulary: int, t5_vocabulary: int, length: int, width: int) -> None:
    """Writes a CLIP and a T5 encoder with random weights, in bfloat16."""
    from transformers import CLIPTextModel, T5EncoderModel

    torch.manual_seed(seed_for(SEED, "text encoders"))
    clip = clip_config(clip_vocabulary, length, width, intermediate_size=128, num_attention_heads=4)
    t5 = t5_config(t5_vocabulary, width, d_kv=16, d_ff=128, num_heads=4)
    models: tuple[tuple[Any, Any, str], ...] = (
        (CLIPTextModel, clip, "text_encoder"),
        (T5EncoderModel, t5, "text_encoder_2"),
    )
    for kind, config, component in models:
        kind(config).to(torch.bfloat16).save_pretrained(folder / component)
