"""A FLUX.2 [klein] checkpoint with few layers and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.model.pretrained import quiet_libraries
from trainer.model.qwen.tiny_chat import chat_model_config, train_chat_tokenizer
from trainer.model.tiny_components import SEED, save_model_index

TEXT_LENGTH = 24
TEXT_LAYERS = (1, 2)


def save_tiny_checkpoint(folder: Path, is_distilled: bool = False) -> None:
    """Writes the checkpoint, with the scheduler of the published ones."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from transformers import Qwen3ForCausalLM

    quiet_libraries()
    torch.manual_seed(SEED)
    tokenizer = train_chat_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    language_model: Any = Qwen3ForCausalLM(chat_model_config(len(tokenizer)))
    language_model.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    vae: Any = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=1
    )
    # Of a trained VAE these are not 0 and 1.
    vae.bn.running_mean.copy_(torch.linspace(-0.2, 0.3, 16))
    vae.bn.running_var.copy_(torch.linspace(0.3, 1.4, 16))
    vae.eval().save_pretrained(folder / "vae")
    transformer: Any = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16 * len(TEXT_LAYERS),
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 4, 4),
    )
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    components = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "Qwen3ForCausalLM"),
        "tokenizer": ("transformers", "Qwen2TokenizerFast"),
        "transformer": ("diffusers", "Flux2Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKLFlux2"),
    }
    save_model_index(folder, "Flux2KleinPipeline", components, is_distilled=is_distilled)
