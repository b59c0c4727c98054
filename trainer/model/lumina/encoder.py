"""The VAE and the language model of a Lumina Image 2.0 checkpoint."""

from __future__ import annotations

from typing import Any

from trainer.model.lumina.prompt import prompt_text
from trainer.model.single_stream.encoder import SingleStreamEncoder


class Lumina2Encoder(SingleStreamEncoder):
    """Reads texts with Gemma 2, after a system prompt."""

    @property
    def model_class(self) -> Any:
        from transformers import Gemma2Model

        return Gemma2Model

    def load_tokenizer(self) -> Any:
        from transformers import GemmaTokenizer

        return GemmaTokenizer.from_pretrained(self.family.component_folder("tokenizer"))

    def full_text(self, caption: str) -> str:
        return prompt_text(caption)
