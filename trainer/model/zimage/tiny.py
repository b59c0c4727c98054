"""A Z-Image checkpoint with few layers and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.model.pretrained import quiet_libraries
from trainer.model.qwen.tiny_chat import chat_model_config, train_chat_tokenizer
from trainer.model.tiny_components import SEED, build_vae, save_model_index

TEXT_LENGTH = 64


def save_tiny_checkpoint(folder: Path, **scheduler_options: Any) -> None:
    """Writes the checkpoint, by default with the scheduler of the published base model."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import Qwen3Model

    quiet_libraries()
    torch.manual_seed(SEED)
    tokenizer = train_chat_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    language_model: Any = Qwen3Model(chat_model_config(len(tokenizer)))
    language_model.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    vae = build_vae((8, 8, 8, 8), latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
    vae.save_pretrained(folder / "vae")
    transformer: Any = ZImageTransformer2DModel(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6]
    )
    with torch.no_grad():
        # Of a trained network these are not zero.
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.normal_()
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**({"shift": 6.0} | scheduler_options))
    scheduler.save_pretrained(folder / "scheduler")
    components = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "Qwen3Model"),
        "tokenizer": ("transformers", "Qwen2Tokenizer"),
        "transformer": ("diffusers", "ZImageTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    save_model_index(folder, "ZImagePipeline", components)
