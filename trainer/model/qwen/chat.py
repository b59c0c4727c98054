"""Captions as a user's words in a chat with a language model."""

from __future__ import annotations

from typing import Any


def chat_text(tokenizer: Any, caption: str, thinking: bool) -> str:
    """Returns a chat whose user says the caption, by the template of the tokenizer.

    Without `thinking`, the answer begins with an empty thought.
    """
    messages = [{"role": "user", "content": caption}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
