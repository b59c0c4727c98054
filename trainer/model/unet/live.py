"""UNet and text encoders in one network, where both train."""

from __future__ import annotations

import torch


class TrainableUNet(torch.nn.Module):
    """Holds the UNet first, then the text encoders, each under its component's name."""

    def __init__(self, unet: torch.nn.Module, text_encoders: dict[str, torch.nn.Module]):
        super().__init__()
        self.unet = unet
        for name, encoder in text_encoders.items():
            self.add_module(name, encoder)

    def enable_gradient_checkpointing(self) -> None:
        """Of the UNet: what text encoders keep for the backward pass of 77 tokens is little beside it."""
        self.unet.enable_gradient_checkpointing()

    def compile_repeated_blocks(self) -> None:
        self.unet.compile_repeated_blocks()
