"""The VAE and the language model of a Z-Image checkpoint."""

from __future__ import annotations

from typing import Any

from trainer.model.qwen.chat import chat_text
from trainer.model.single_stream.encoder import SingleStreamEncoder


class ZImageEncoder(SingleStreamEncoder):
    """Reads texts with Qwen3, as a chat."""

    @property
    def model_class(self) -> Any:
        from transformers import Qwen3Model

        return Qwen3Model

    def load_tokenizer(self) -> Any:
        from transformers import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(self.family.component_folder("tokenizer"))

    def full_text(self, caption: str) -> str:
        return chat_text(self.tokenizer, caption, thinking=True)
