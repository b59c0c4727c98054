"""LoKr."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from trainer.core.errors import UsageError
from trainer.method.loha import Loha

if TYPE_CHECKING:
    from peft import PeftConfig


class LokrInit(Enum):
    """Which factor starts at zero."""

    peft = "peft"
    """The small one, peft's default."""
    lycoris = "lycoris"
    """The large one, as in LyCORIS."""


@dataclass(slots=True)
class Lokr(Loha):
    """LoKr (Yeh et al. 2024): W + alpha / rank * kron(C, B A).

    A factor is a full matrix instead of a product if its side is at most twice the rank.
    """

    decompose_both: bool = False
    """Whether C is a product of low rank too."""
    decompose_factor: int = -1
    """Size of C; -1: near the square root of each side of W."""
    init: LokrInit = LokrInit.peft

    def __post_init__(self) -> None:
        Loha.__post_init__(self)
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise UsageError(
                f"method.decompose_factor={self.decompose_factor} cannot divide a side; "
                "type 2 or more, or -1 for one near the square root"
            )

    def peft_config(self, targets: list[str]) -> PeftConfig:
        from peft import LoKrConfig

        alpha: Any = self.alpha  # annotated as int, but peft accepts any number
        return LoKrConfig(
            r=self.rank,
            alpha=alpha,
            rank_dropout=self.rank_dropout,
            module_dropout=self.module_dropout,
            decompose_both=self.decompose_both,
            decompose_factor=self.decompose_factor,
            init_weights="lycoris" if self.init is LokrInit.lycoris else True,
            target_modules=targets,
        )
