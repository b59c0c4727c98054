"""DoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trainer.method.lora import Lora

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig


@dataclass(slots=True)
class Dora(Lora):
    """DoRA (Liu et al. 2024): rows m V / |V| with V = W + alpha / rank * B A. The magnitude m starts at |W|."""

    # ComfyUI divides by |W| instead of |V|, so it would generate images with different weights.
    formats: ClassVar[tuple[str, ...]] = ("diffusers", "peft", "pipeline", "single_file")

    def peft_config(self, targets: list[str]) -> LoraConfig:
        config = Lora.peft_config(self, targets)
        config.use_dora = True
        return config

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        from trainer.method.adapter_layers import init_magnitudes

        Lora.attach(self, network, targets, seed)
        init_magnitudes(network)
