"""Adam of bitsandbytes, with 8-bit moments."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.optimizer.adamw8bit import AdamW8bit


@dataclass(slots=True)
class Adam8bit(AdamW8bit):
    """Adam8bit of bitsandbytes. Its weight decay is decoupled too: only the default differs from AdamW8bit."""

    weight_decay: float = 0.0

    class_name = "Adam8bit"
