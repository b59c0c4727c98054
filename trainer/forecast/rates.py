"""How long operations take at the peak rates of a card."""

from __future__ import annotations

from trainer.forecast.phases import Work
from trainer.hardware import Card


def seconds(work: Work, card: Card) -> float | None:
    """Returns the time of operations by the roofline model (Williams et al. 2009); None if a rate is unknown.

    Each operation takes max(FLOPs / rate of arithmetic, bytes / bandwidth), without overlap and at the full rates: a
    lower bound, except where a kernel reads its input from a cache. In practice, kernels reach 50 to 80 % of them.
    """
    if card.bandwidth is None:
        return None
    total = 0.0
    for (dtype, flops, moved), count in work.items():
        arithmetic = 0.0
        if flops:
            if dtype not in card.tflops:
                return None
            arithmetic = flops / (card.tflops[dtype] * 1e12)
        total += count * max(arithmetic, moved / (card.bandwidth * 1e9))
    return total
