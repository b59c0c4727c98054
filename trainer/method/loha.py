"""LoHa."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.method.adapter import Adapter

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(slots=True)
class Loha(Adapter):
    """LoHa (Hyeon-Woo et al. 2022): W + alpha / rank * (B1 A1) * (B2 A2), where the second * multiplies entry by entry.

    The rank of the update is up to rank^2.
    """

    rank_dropout: float = 0.0
    """Dropout of rows of the update."""
    module_dropout: float = 0.0
    """Dropout of the updates of whole layers."""

    formats: ClassVar[tuple[str, ...]] = ("comfyui", "peft", "pipeline", "single_file")

    def peft_config(self, targets: list[str]) -> PeftConfig:
        from peft import LoHaConfig

        alpha: Any = self.alpha  # annotated as int, but peft accepts any number
        return LoHaConfig(
            r=self.rank,
            alpha=alpha,
            rank_dropout=self.rank_dropout,
            module_dropout=self.module_dropout,
            target_modules=targets,
        )
