"""A Lumina Image 2.0 checkpoint with few layers and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.core import documents
from trainer.model.lumina.prompt import SYSTEM_PROMPT
from trainer.model.pretrained import quiet_libraries
from trainer.model.tiny_components import CHARACTERS, SEED, WORDS, build_vae, save_model_index

TEXT_LENGTH = 48


def save_tiny_checkpoint(folder: Path) -> None:
    """Writes the checkpoint, with the scheduler of the published model."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    quiet_libraries()
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
    )
    language_model: Any = Gemma2Model(config)
    language_model.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    vae = build_vae((8, 8, 8, 8), latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
    vae.save_pretrained(folder / "vae")
    transformer: Any = Lumina2Transformer2DModel(
        sample_size=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        cap_feat_dim=16,
    )
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.save_pretrained(folder / "scheduler")
    components = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "Gemma2Model"),
        "tokenizer": ("transformers", "GemmaTokenizer"),
        "transformer": ("diffusers", "Lumina2Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    save_model_index(folder, "Lumina2Pipeline", components)


def train_tokenizer() -> Any:
    """Returns a tokenizer with one token per word of the system prompt and of `WORDS`, and one per character."""
    from tokenizers import processors, trainers
    from transformers import GemmaTokenizer

    tokenizer_class: Any = GemmaTokenizer
    # Normalization and splitting are those of the class.
    backend = tokenizer_class().backend_tokenizer
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=[*CHARACTERS], special_tokens=special
    )
    backend.train_from_iterator([SYSTEM_PROMPT, f"{' '.join(WORDS)} <Prompt Start> "], trainer)
    model = documents.parse_json(backend.to_str())["model"]
    tokenizer = tokenizer_class(model["vocab"], [tuple(merge) for merge in model["merges"]])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer
