"""Checkpoints with few layers and random weights, in the layout of the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.model import quiet_libraries
from trainer.model.mini_kontext.build import SEED, save_clip_tokenizer

if TYPE_CHECKING:
    from trainer.model.unet import UNet

WORDS = ("make", "it", "night", "paint", "the", "a", "photo", "of")
LENGTH = 8
"""Tokens a caption."""
WIDTH = 16
"""Of a text encoder's states."""


def save(folder: Path, family: type[UNet]) -> None:
    """A UNet of two levels on latents of an eighth of the picture's side, and the family's text encoders."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    quiet_libraries()
    torch.manual_seed(SEED)
    several = len(family.texts) > 1
    for text in family.texts:
        _save_text(folder, family, text)
    # Projected texts and six sizes are added to the times where there are two text encoders.
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": WIDTH + 6 * 4,
        "use_linear_projection": True,
    }
    UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=WIDTH * len(family.texts),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **(added if several else {}),
    ).save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
        scaling_factor=0.5,
    )
    # A trained VAE is sure of its latents: the log of their variance, its second four channels, is near -8.
    vae.quant_conv.bias.data[4:] -= 8
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    _save_index(folder, family, several)


def _save_text(folder: Path, family: type[UNet], text: str) -> None:
    from transformers import CLIPTextConfig

    words = save_clip_tokenizer(folder / f"tokenizer{text}", WORDS, LENGTH)
    config = CLIPTextConfig(
        vocab_size=words,
        max_position_embeddings=LENGTH,
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_factor=3.0,
    )
    family.text_class(text)(config).save_pretrained(folder / f"text_encoder{text}")


def _save_index(folder: Path, family: type[UNet], several: bool) -> None:
    """The file by which diffusers loads the folder."""
    texts = {f"text_encoder{text}": ("transformers", family.text_class(text).__name__) for text in family.texts}
    texts |= {f"tokenizer{text}": ("transformers", "CLIPTokenizer") for text in family.texts}
    classes = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "image_encoder": (None, None),
        "feature_extractor": (None, None),
        **texts,
    }
    own = (
        {"force_zeros_for_empty_prompt": True}
        if several
        else {"requires_safety_checker": False, "safety_checker": (None, None)}
    )
    index = {"_class_name": family.pipeline().__name__, "_diffusers_version": "0.42.1", **own, **classes}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
