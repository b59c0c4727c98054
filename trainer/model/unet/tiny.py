"""Checkpoints with few layers and random weights, in the layout of the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.model.pretrained import quiet_libraries
from trainer.model.tiny_components import (
    SEED,
    WORDS,
    build_vae,
    clip_config,
    save_clip_tokenizer,
    save_model_index,
)

if TYPE_CHECKING:
    from trainer.model.unet.family import UNetFamily

TEXT_LENGTH = 8
"""Tokens per caption."""
TEXT_WIDTH = 16
"""Width of the states of a text encoder."""


def save_tiny_checkpoint(folder: Path, family: type[UNetFamily]) -> list[str]:
    """Writes a UNet of two levels on latents of an eighth of the image's side, and the family's text encoders.

    Returns the overrides (`key=value`) that select it.
    """
    from diffusers import DDIMScheduler, UNet2DConditionModel

    quiet_libraries()
    torch.manual_seed(SEED)
    for suffix in family.text_suffixes:
        _save_text_encoder(folder, family, suffix)
    two_text_encoders = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        # The pooled text and six sizes are added to the time embedding.
        "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 4,
        "use_linear_projection": True,
    }
    unet: Any = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH * len(family.text_suffixes),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **(two_text_encoders if len(family.text_suffixes) > 1 else {}),
    )
    unet.save_pretrained(folder / "unet")
    vae = build_vae((8, 8, 8, 8), scaling_factor=0.5)
    # The second four channels are the log variance of the latents, which is near -8 in a trained VAE.
    vae.quant_conv.bias.data[4:] -= 8
    vae.save_pretrained(folder / "vae")
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.save_pretrained(folder / "scheduler")
    _save_index(folder, family)
    return ["model.suggested.precision=fp32", f"model.path={folder}", "dataset.resolution=32"]


def _save_text_encoder(folder: Path, family: type[UNetFamily], suffix: str) -> None:
    vocabulary = save_clip_tokenizer(folder / f"tokenizer{suffix}", WORDS, TEXT_LENGTH)
    config = clip_config(vocabulary, TEXT_LENGTH, TEXT_WIDTH, intermediate_size=32, num_attention_heads=2)
    family.text_encoder_class(suffix)(config).save_pretrained(folder / f"text_encoder{suffix}")


def _save_index(folder: Path, family: type[UNetFamily]) -> None:
    text_encoders = {
        f"text_encoder{suffix}": ("transformers", family.text_encoder_class(suffix).__name__)
        for suffix in family.text_suffixes
    }
    tokenizers = {f"tokenizer{suffix}": ("transformers", "CLIPTokenizer") for suffix in family.text_suffixes}
    options: dict[str, Any] = {"requires_safety_checker": False, "safety_checker": (None, None)}
    if len(family.text_suffixes) > 1:
        options = {"force_zeros_for_empty_prompt": True}
    save_model_index(
        folder,
        family.pipeline_class().__name__,
        {
            "unet": ("diffusers", "UNet2DConditionModel"),
            "vae": ("diffusers", "AutoencoderKL"),
            "scheduler": ("diffusers", "DDIMScheduler"),
            "image_encoder": (None, None),
            "feature_extractor": (None, None),
            **text_encoders,
            **tokenizers,
        },
        **options,
    )
