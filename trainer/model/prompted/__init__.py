"""A denoiser whose condition a language model writes; imported only where a network is made, for it needs torch."""

from __future__ import annotations

import torch


class Prompted(torch.nn.Module):
    """`llm` (a decoder without its head) and `unet`, and between them `soft_prompt`, which a method puts there; see trainer.method.soft_prompt."""

    def __init__(self, llm: torch.nn.Module, unet: torch.nn.Module):
        super().__init__()
        self.llm, self.unet = llm, unet

    @property
    def config(self):
        return self.unet.config

    @property
    def prompt_sizes(self) -> dict[str, int]:
        """What a soft prompt has to fit, by the names of `trainer.method.soft_prompt.Reader`."""
        config = self.llm.config.get_text_config()
        return {
            "hidden": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            "head": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "width": self.unet.config.cross_attention_dim,
        }

    def condition(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the denoiser attends to, (B, n, width): the last hidden states at the n learnt positions behind `tokens` (B, L), of which
        `mask` (B, L) says which are there."""
        from transformers import DynamicCache

        prompt = self.soft_prompt
        embedded = self.llm.get_input_embeddings()(tokens)
        count, learnt = len(embedded), prompt.tokens.to(embedded.dtype)
        embedded = torch.cat([embedded, learnt.expand(count, -1, -1)], 1)
        there = torch.cat([mask.new_ones(count, prompt.length), mask, mask.new_ones(count, len(learnt))], 1)
        # What is filled up between text and learnt positions takes no place.
        places = (there.cumsum(1) - 1).clamp(min=0)[:, prompt.length :]
        prefix = DynamicCache()
        for layer, pair in enumerate(prompt.keys_and_values()):
            prefix.update(*(side.to(embedded.dtype).expand(count, -1, -1, -1) for side in pair), layer)
        states = self.llm(
            inputs_embeds=embedded, attention_mask=there, position_ids=places, past_key_values=prefix, use_cache=True
        ).last_hidden_state
        return prompt.map(states[:, -len(learnt) :])

    def train(self, mode: bool = True) -> Prompted:
        """The language model is read from only, so its own dropout stays off."""
        super().train(mode)
        self.llm.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Of the denoiser alone: with it a language model drops its cache, and the prefix with it."""
        self.unet.enable_gradient_checkpointing()

    def compile_repeated_blocks(self) -> None:
        self.unet.compile_repeated_blocks()
