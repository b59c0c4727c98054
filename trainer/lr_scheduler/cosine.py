"""Cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.lr_scheduler import LRScheduler


@dataclass(slots=True)
class Cosine(LRScheduler):
    """Half a period of a cosine (Loshchilov & Hutter 2017, without restarts)."""

    def decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))
