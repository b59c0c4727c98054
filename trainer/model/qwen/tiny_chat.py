"""A small Qwen3 with random weights, and a tokenizer with a chat template."""

from __future__ import annotations

import json
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The part of the published template that texts of a user pass through."""


def chat_model_config(vocabulary: int) -> Any:
    """Returns the Qwen3Config of three layers; large initial weights keep different prompts far apart."""
    from transformers import Qwen3Config

    return Qwen3Config(
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


def train_chat_tokenizer() -> Any:
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
