"""LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.method.adapter import Adapter

if TYPE_CHECKING:
    from peft import LoraConfig


class LoraInit(Enum):
    """Initial values of A. B starts at zero."""

    kaiming = "kaiming"
    """Kaiming uniform, peft's default."""
    gaussian = "gaussian"


@dataclass(slots=True)
class Lora(Adapter):
    """LoRA (Hu et al. 2021): W + alpha / rank * B A."""

    dropout: float = 0.0
    """Dropout of the adapter's input."""
    init: LoraInit = LoraInit.kaiming

    formats: ClassVar[tuple[str, ...]] = ("diffusers", "peft", "comfyui", "pipeline", "single_file")

    def peft_config(self, targets: list[str]) -> LoraConfig:
        from peft import LoraConfig

        alpha: Any = self.alpha  # annotated as int, but peft accepts any number
        return LoraConfig(
            r=self.rank,
            lora_alpha=alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            init_lora_weights="gaussian" if self.init is LoraInit.gaussian else True,
        )
