"""A FLUX.2 [klein] checkpoint with few layers and random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from trainer.model.pretrained import quiet_libraries
from trainer.model.tiny_components import SEED, save_model_index

TEXT_LENGTH = 24
TEXT_LAYERS = (1, 2)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The part of the published template that texts of a user pass through."""


def save_tiny_checkpoint(folder: Path, is_distilled: bool = False) -> None:
    """Writes the checkpoint, with the scheduler of the published ones."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    quiet_libraries()
    torch.manual_seed(SEED)
    tokenizer = _train_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    _build_language_model(len(tokenizer)).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
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


def _build_language_model(vocabulary: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    # Large initial weights keep different prompts far apart.
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def _train_tokenizer() -> Any:
    """Returns a tokenizer trained on the template and a few words."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    special = ("<|im_start|>", "<|im_end|>")
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", *special],
    )
    tokenizer_class: Any = Qwen2Tokenizer
    # Normalization and splitting are those of the class.
    backend = tokenizer_class().backend_tokenizer
    texts = ["user\n", "assistant\n<think>\n\n</think>\n\n", "make it night", "paint the photo"]
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = tokenizer_class(model["vocab"], merges, extra_special_tokens=list(special))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
