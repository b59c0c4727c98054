"""A small Qwen3 with random weights, and a tokenizer with a chat template."""

from __future__ import annotations

from typing import Any

from trainer.model.qwen.tiny import train_tokenizer

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
    texts = ["user\n", "assistant\n<think>\n\n</think>\n\n", "make it night", "paint the photo"]
    tokenizer = train_tokenizer(texts, ("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
