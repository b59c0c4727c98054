"""A UNet and its text encoders as one network, for runs that train both."""

from __future__ import annotations

from typing import Any

import torch


class UNetWithTextEncoders(torch.nn.Module):
    """Holds the UNet, then the text encoders, each under the name of its component."""

    def __init__(self, unet: Any, text_encoders: dict[str, torch.nn.Module]):
        super().__init__()
        self.unet = unet
        for name, encoder in text_encoders.items():
            self.add_module(name, encoder)

    def enable_gradient_checkpointing(self) -> None:
        """Applies to the UNet only: the activations of 77 tokens in the text encoders are small."""
        self.unet.enable_gradient_checkpointing()

    def compile_repeated_blocks(self) -> None:
        """Applies to the UNet only."""
        self.unet.compile_repeated_blocks()
