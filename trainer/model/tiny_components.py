"""Small components with random weights, and the other files of a checkpoint; made offline."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.core import files

SEED = 1
WORDS = ("make", "it", "night", "paint", "the", "a", "photo", "of")
"""Vocabulary of the tiny checkpoints."""
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
DIFFUSERS_VERSION = "0.42.1"


def build_vae(widths: Sequence[int], latent_channels: int = 4, **options: Any) -> Any:
    """Returns an AutoencoderKL with one layer per width; each width after the first halves the size.

    GroupNorm has a single group: with two channels per group, it removes color at this size.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=tuple(widths),
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        mid_block_add_attention=False,
        **options,
    )


def clip_config(vocabulary: int, length: int, width: int, **options: Any) -> Any:
    """Returns the CLIPTextConfig of two layers; large initial weights keep different words far apart."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocabulary,
        max_position_embeddings=length,
        hidden_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_factor=3.0,
        **options,
    )


def t5_config(vocabulary: int, width: int, **options: Any) -> Any:
    """Returns the T5Config of two layers, with weights as large as those of `clip_config`."""
    from transformers import T5Config

    return T5Config(
        vocab_size=vocabulary,
        d_model=width,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        initializer_factor=3.0,
        **options,
    )


def save_clip_tokenizer(folder: Path, words: Sequence[str], length: int) -> int:
    """Writes a CLIP tokenizer with one token per word and characters for the rest; returns its vocabulary size."""
    from transformers import CLIPTokenizer

    special = ("<|startoftext|>", "<|endoftext|>")
    pieces = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS)]
    merges = []
    for word in words:
        left = word[0]
        for i, character in enumerate(word[1:], 2):
            right = character if i < len(word) else f"{character}</w>"
            if (left, right) not in merges:
                merges.append((left, right))
                pieces.append(left + right)
            left += right
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*special, *pieces]))}
    tokenizer: Any = CLIPTokenizer
    tokenizer(vocabulary, merges, model_max_length=length).save_pretrained(folder)
    return len(vocabulary)


def save_t5_tokenizer(folder: Path, words: Sequence[str], length: int) -> int:
    """Writes a T5 tokenizer with one token per word and characters for the rest; returns its vocabulary size."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    whole = [(f"▁{word}", -1.0) for word in words]
    single = [(character, -4.0) for character in dict.fromkeys(CHARACTERS + string.ascii_uppercase)]
    vocabulary = [*special, *whole, *single]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length).save_pretrained(folder)
    return len(vocabulary)


def save_model_index(
    folder: Path, pipeline: str, components: Mapping[str, tuple[str, str] | tuple[None, None]], **options: Any
) -> None:
    """Writes the file from which diffusers loads the folder: component -> (library, class)."""
    index = {"_class_name": pipeline, "_diffusers_version": DIFFUSERS_VERSION, **options, **components}
    files.write_json(folder / "model_index.json", index)
