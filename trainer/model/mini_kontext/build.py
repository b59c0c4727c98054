"""Checkpoint folders in FLUX Kontext's layout, made from nothing: small networks with random weights, tokenizers of a few words."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.core.rng import seed_for
from trainer.model import quiet_libraries

SEED = 1


def save_folder(
    folder: Path,
    vae: torch.nn.Module,
    transformer: torch.nn.Module,
    words: Sequence[str],
    *,
    text_length: int,
    text_width: int,
) -> None:
    """A whole checkpoint: `vae` and `transformer` (in bfloat16) as given, random text encoders whose vocabulary is `words`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    quiet_libraries()
    sizes = save_tokenizers(folder, words, text_length)
    save_text_encoders(folder, *sizes, text_length, text_width)
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    vae.eval().save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    save_index(folder)


CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


def save_tokenizers(folder: Path, words: Sequence[str], length: int) -> tuple[int, int]:
    """A CLIP and a T5 tokenizer with whole words, and single characters for all else; returns the vocabulary sizes."""
    from transformers import T5Tokenizer

    clip_words = save_clip_tokenizer(folder / "tokenizer", words, length)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    whole = [(f"▁{word}", -1.0) for word in words]
    single = [(c, -4.0) for c in dict.fromkeys(CHARACTERS + string.ascii_uppercase)]
    t5 = T5Tokenizer(vocab=[*special, *whole, *single], extra_ids=0, model_max_length=length)
    t5.save_pretrained(folder / "tokenizer_2")
    return clip_words, len(special) + len(whole) + len(single)


def save_clip_tokenizer(folder: Path, words: Sequence[str], length: int) -> int:
    """A CLIP tokenizer with whole words, and single characters for all else; returns the size of its vocabulary."""
    from transformers import CLIPTokenizer

    ends = ("<|startoftext|>", "<|endoftext|>")
    pieces, merges = [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)], []
    for word in words:
        left = word[0]
        for i, character in enumerate(word[1:], 2):
            right = character if i < len(word) else f"{character}</w>"
            if (left, right) not in merges:
                merges.append((left, right))
                pieces.append(left + right)
            left += right
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*ends, *pieces]))}
    CLIPTokenizer(vocabulary, merges, model_max_length=length).save_pretrained(folder)
    return len(vocabulary)


def save_text_encoders(folder: Path, clip_words: int, t5_words: int, length: int, width: int) -> None:
    """Frozen random CLIP and T5 encoders; large initial weights keep different words far apart."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed_for(SEED, "text encoders"))
    shape = {"hidden_size": width, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPTextConfig(
        vocab_size=clip_words,
        max_position_embeddings=length,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_factor=3.0,
        **shape,
    )
    CLIPTextModel(clip).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    t5 = T5Config(
        vocab_size=t5_words,
        d_model=width,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        initializer_factor=3.0,
    )
    T5EncoderModel(t5).to(torch.bfloat16).save_pretrained(folder / "text_encoder_2")


def save_index(folder: Path) -> None:
    """The file by which diffusers' FluxKontextPipeline loads the folder."""
    classes = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "T5Tokenizer"),
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "image_encoder": (None, None),
        "feature_extractor": (None, None),
    }
    index = {"_class_name": "FluxKontextPipeline", "_diffusers_version": "0.42.1", **classes}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
