"""The text that the language model reads: the template of the tokenizer's chats around the caption."""

from __future__ import annotations

from typing import Any


def chat_text(tokenizer: Any, caption: str) -> str:
    """Returns a chat whose user says the caption, and whose answer begins without a thought."""
    messages = [{"role": "user", "content": caption}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
