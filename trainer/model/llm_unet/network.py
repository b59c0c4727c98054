"""A UNet and the frozen language model that conditions it, as one network."""

from __future__ import annotations

from typing import Any

import torch


class LLMConditionedUNet(torch.nn.Module):
    """Holds `llm` (a decoder without its head), `unet`, and between them `soft_prompt`.

    The method `soft_prompt` sets the last; see `trainer.method.soft_prompt_encoder.SoftPromptEncoder`.
    """

    def __init__(self, llm: Any, unet: Any):
        super().__init__()
        self.llm = llm
        self.unet = unet
        self.soft_prompt: Any

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def prompt_sizes(self) -> dict[str, int]:
        """Arguments of `trainer.method.soft_prompt_encoder.PromptSizes`."""
        config = self.llm.config.get_text_config()
        return {
            "hidden": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            "head": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "width": self.unet.config.cross_attention_dim,
        }

    def encode_prompt(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns what the UNet attends to, (B, n, width): the last hidden states at the n learned embeddings.

        The embeddings follow the token ids (B, L); `mask` (B, L) is 0 where these are padding.
        """
        from transformers import DynamicCache

        prompt = self.soft_prompt
        embeddings = self.llm.get_input_embeddings()(tokens)
        batch, learned = len(embeddings), prompt.tokens.to(embeddings.dtype)
        embeddings = torch.cat([embeddings, learned.expand(batch, -1, -1)], 1)
        attended = torch.cat([mask.new_ones(batch, prompt.length), mask, mask.new_ones(batch, len(learned))], 1)
        # Padding between the text and the learned embeddings takes no positions.
        positions = (attended.cumsum(1) - 1).clamp(min=0)[:, prompt.length :]
        prefix = DynamicCache()
        for layer, (key, value) in enumerate(prompt.keys_and_values()):
            shape = (batch, -1, -1, -1)
            prefix.update(key.to(embeddings.dtype).expand(shape), value.to(embeddings.dtype).expand(shape), layer)
        states = self.llm(
            inputs_embeds=embeddings,
            attention_mask=attended,
            position_ids=positions,
            past_key_values=prefix,
            use_cache=True,
        ).last_hidden_state
        return prompt.map(states[:, -len(learned) :])

    def train(self, mode: bool = True) -> LLMConditionedUNet:
        """Keeps the language model in eval mode, so that its dropout stays off."""
        super().train(mode)
        self.llm.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Applies to the UNet only: a language model drops its cache, and with it the prefix, when checkpointing."""
        self.unet.enable_gradient_checkpointing()

    def compile_repeated_blocks(self) -> None:
        """Applies to the UNet only."""
        self.unet.compile_repeated_blocks()
