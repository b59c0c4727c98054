"""Soft prompt of a frozen language model; see `trainer.method.soft_prompt_encoder`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.core.errors import UsageError
from trainer.core.rng import seed_for
from trainer.core.settings import added
from trainer.method import Method

if TYPE_CHECKING:
    import torch

    from trainer.method.soft_prompt_encoder import SoftPromptEncoder


@dataclass(slots=True)
class SoftPrompt(Method):
    """Trains what a frozen language model reads in addition to its text."""

    num_image_prompt: int = 2
    """Number of learned embeddings after the text."""
    num_prefix_prompt: int = 2
    """Number of learned keys and values before the text, in every layer."""
    prefix_projection: bool = False
    """Whether the keys and values are computed by two trained layers, instead of being parameters themselves."""
    prefix_width: int = 64
    """Width of the first of these layers."""
    token_std: float = added(0.02)
    """Standard deviation of the initial values of the learned embeddings."""

    freezes = True
    reads_weights_outside_forward = True
    formats: ClassVar[tuple[str, ...]] = ("soft_prompt",)

    def __post_init__(self) -> None:
        if self.num_image_prompt < 1:
            raise UsageError(
                f"method.num_image_prompt={self.num_image_prompt} gives the image no condition; "
                "type 1 or more, such as 2"
            )
        if self.num_prefix_prompt < 0:
            raise UsageError(
                f"method.num_prefix_prompt={self.num_prefix_prompt} must not be negative; type 0 for none, or 2"
            )
        if self.prefix_width < 1:
            raise UsageError(f"method.prefix_width={self.prefix_width} is too small; type 1 or more, such as 64")
        if self.token_std <= 0:
            raise UsageError(f"method.token_std={self.token_std:g} makes all tokens equal; type 0.02, or 1.0")

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        network.requires_grad_(False)
        network.soft_prompt = self.initial_prompt(network, seed)

    def initial_prompt(self, network: torch.nn.Module, seed: int) -> SoftPromptEncoder:
        """Returns the soft prompt at the start of training, for a network that has `prompt_sizes`."""
        import torch

        from trainer.method.soft_prompt_encoder import PromptSizes, SoftPromptEncoder

        sizes: Any = network.prompt_sizes
        torch.manual_seed(seed_for(seed, "adapter"))
        encoder = SoftPromptEncoder(
            PromptSizes(**sizes),
            self.num_image_prompt,
            self.num_prefix_prompt,
            self.prefix_width if self.prefix_projection else None,
            self.token_std,
        )
        return encoder.to(next(network.parameters()).device)
