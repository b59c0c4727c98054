"""Loss scaling for float16 products."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """Factor of the loss in the backward pass (Micikevicius et al. 2018).

    Gradients in float16 vanish below 6e-8 and overflow above 65504, so the scale is as large as possible without
    overflow. It is a power of two, so that scaling changes no digits. The constants are those of torch's GradScaler.
    Checkpoints store the two fields by name.
    """

    value: float = 2.0**16
    since: int = 0
    """Number of steps since `value` changed."""

    def update(self, finite: bool) -> None:
        """Halves the scale after gradients that overflowed; doubles it after 2000 steps without overflow."""
        self.since += 1
        if not finite:
            self.value, self.since = self.value / 2, 0
        elif self.since == 2000:
            self.value, self.since = self.value * 2, 0
