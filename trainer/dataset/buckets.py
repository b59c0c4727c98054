"""The sizes that pictures of several shapes are brought to, so that little is cut off and each forward pass has one size."""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""(width, height) in pixels."""
STEPS = 16
"""Steps of a bucket's sides over the side of a square: 64 px at 1024 px."""


def made(width: int, height: int, multiple: int, ratio: float) -> tuple[Size, ...]:
    """Sizes of at most `width` x `height` pixels in all, sides divisible by `multiple`, the longer at most `ratio` times the shorter.

    For each width the largest height that fits (as in NovelAI's aspect ratio bucketing, 2022).
    """
    area = width * height
    step = multiple * max(1, round(math.sqrt(area) / STEPS / multiple))
    sizes = set()
    for across in range(step, int(math.sqrt(area * ratio)) + 1, step):
        down = int(min(area // across, across * ratio)) // step * step
        if down and max(across, down) <= ratio * min(across, down):
            sizes.add((across, down))
    # Of two where one is larger in both sides only that: 1344x768, not 1280x768.
    largest = {
        size
        for size in sizes
        if not any(other != size and other[0] >= size[0] and other[1] >= size[1] for other in sizes)
    }
    return tuple(sorted(largest | {(width, height)}))


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """Of `sizes` that whose aspect ratio is nearest to a picture's; of equals the largest."""
    width, height = size
    return min(
        sizes, key=lambda other: (abs(math.log(other[0] / other[1] * height / width)), -other[0] * other[1], other)
    )


def enlargement(size: Size, to: Size) -> float:
    """By what a picture is scaled to cover a size; above 1 it is enlarged, and looks soft."""
    return max(to[0] / size[0], to[1] / size[1])
