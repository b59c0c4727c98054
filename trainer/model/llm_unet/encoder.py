"""The frozen components of a checkpoint, and a language model that writes keywords."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from trainer.model.pretrained import load_text_encoder
from trainer.model.unet.encoder import UNetEncoder

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample
    from trainer.model.pmg import PMG

NUMBERED = re.compile(r"\d+\.\s*([^\d\n.,;:\"]+)")
"""A keyword in a numbered list: "1. soft light 2. pastel"."""


class LLMUNetEncoder(UNetEncoder):
    """See `trainer.model.Encoder`. Each prompt for keywords is answered once."""

    family: PMG

    def __init__(self, family: PMG, device: torch.device):
        super().__init__(family, device)
        self._written: dict[str, str] = {}

    @torch.no_grad()
    def encode(self, name: str, sample: TransformedSample) -> torch.Tensor:
        if name == "negative":
            family = self.family
            if sample.caption:
                # Not read. States are never all zero, so that zeros tell which samples have a caption.
                dtype = family.encoder_dtype_of("text_encoder").torch
                return torch.zeros(1, family.component_config("unet")["cross_attention_dim"], dtype=dtype)
            return self._clip_states(family.clip_token_ids(family.negative_prompt or "", family.negative_tokens))
        kind, _, what = name.partition("_")
        if what not in ("words", "keywords"):
            return super().encode(name, sample)
        token_ids = self.family.clip_token_ids(self._keywords(sample.text(f"{kind}_prompt")))
        return token_ids if what == "words" else self._clip_states(token_ids)

    def _clip_states(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Returns the last hidden states of the text encoder, (L, width), for token ids (L,)."""
        return self._clip(token_ids[None].to(self.device)).last_hidden_state[0].cpu()

    def _keywords(self, prompt: str) -> str:
        """Returns the keywords that the language model writes after a prompt, joined by commas; none for no prompt."""
        if prompt and prompt not in self._written:
            self._written[prompt] = ", ".join(parse_keywords(self._write(prompt)))
        return self._written[prompt] if prompt else ""

    def _write(self, prompt: str) -> str:
        """Returns at most `keyword_tokens` tokens that follow the prompt, each the most probable one."""
        from transformers import GenerationConfig

        config = self._llm.generation_config
        token_ids = self.family.tokenize("tokens", prompt)[None].to(self.device)
        # Not the model's own config, whose temperature or penalties would change the words.
        greedy = GenerationConfig(
            max_new_tokens=self.family.keyword_tokens,
            do_sample=False,
            eos_token_id=config.eos_token_id,
            pad_token_id=0 if config.pad_token_id is None else config.pad_token_id,
        )
        written = self._llm.generate(token_ids, attention_mask=torch.ones_like(token_ids), generation_config=greedy)
        return self.family.decode_tokens(written[0, token_ids.shape[1] :])

    @cached_property
    def _llm(self) -> Any:
        from transformers import AutoModelForCausalLM

        dtype = self.family.encoder_dtype_of("llm").torch
        return load_text_encoder(AutoModelForCausalLM, self.family.component_folder("llm"), dtype, self.device)

    @cached_property
    def _clip(self) -> Any:
        return self.family.load_text_encoder("", self.device)


def parse_keywords(text: str) -> list[str]:
    """Returns the items of a numbered list; of text without one, the parts between commas and line breaks."""
    found = NUMBERED.findall(text) or re.split(r"[,\n;]", text)
    return [keyword for keyword in (item.strip(" .\t") for item in found) if keyword]
