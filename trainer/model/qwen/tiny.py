"""A Qwen-Image-Edit checkpoint with few layers and random weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.model.pretrained import quiet_libraries
from trainer.model.qwen.template import ANSWER, SPECIAL_TOKENS, SYSTEM
from trainer.model.tiny_components import SEED, save_model_index


def save_tiny_checkpoint(folder: Path) -> None:
    """Writes the checkpoint, with the published checkpoint's scheduler."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2VLImageProcessorPil

    quiet_libraries()
    torch.manual_seed(SEED)
    texts = [SYSTEM, ANSWER, "Picture 1: ", "make it night", "paint the photo"]
    tokenizer = train_tokenizer(texts, SPECIAL_TOKENS)
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "processor")
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    _build_language_model(tokenizer).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    vae: Any = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 0.8, 1.1, 1.4],
    )
    vae.save_pretrained(folder / "vae")
    transformer: Any = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    scheduler: Any = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
    )
    scheduler.save_pretrained(folder / "scheduler")
    save_model_index(
        folder,
        "QwenImageEditPipeline",
        {
            "processor": ("transformers", "Qwen2VLProcessor"),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
            "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
            "tokenizer": ("transformers", "Qwen2Tokenizer"),
            "transformer": ("diffusers", "QwenImageTransformer2DModel"),
            "vae": ("diffusers", "AutoencoderKLQwenImage"),
        },
    )


def _build_language_model(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    # Large initial weights keep different prompts far apart.
    shared = {"hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.5}
    text = shared | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = shared | {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def train_tokenizer(texts: Sequence[str], special_tokens: Sequence[str]) -> Any:
    """Returns a Qwen2 tokenizer trained on a template and a few words.

    With the texts of this module, SYSTEM is as long as in the published one.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", *special_tokens],
    )
    tokenizer_class: Any = Qwen2Tokenizer
    # Normalization and splitting are those of the class.
    backend = tokenizer_class().backend_tokenizer
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return tokenizer_class(model["vocab"], merges, extra_special_tokens=list(special_tokens))
