"""Aspect ratio buckets: sizes for images of several shapes, so that little is cropped and each batch has one size."""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""(width, height) in pixels."""
STEPS_PER_SIDE = 16
"""The side of a square divided by the difference between two buckets' sides: 64 px at 1024 px."""


def make_buckets(width: int, height: int, multiple: int, max_ratio: float) -> tuple[Size, ...]:
    """Returns sizes with at most `width * height` pixels each, whose sides are divisible by `multiple`.

    The longer side is at most `max_ratio` times the shorter. Each width has the largest height that fits (as in
    NovelAI's aspect ratio bucketing, 2022).
    """
    area = width * height
    step = multiple * max(1, round(math.sqrt(area) / STEPS_PER_SIDE / multiple))
    sizes = set()
    for x in range(step, int(math.sqrt(area * max_ratio)) + 1, step):
        y = int(min(area // x, x * max_ratio)) // step * step
        if y and max(x, y) <= max_ratio * min(x, y):
            sizes.add((x, y))
    # If another size is as large on both sides, drop the smaller one: keep 1344x768, not 1280x768.
    largest = {
        size
        for size in sizes
        if not any(other != size and other[0] >= size[0] and other[1] >= size[1] for other in sizes)
    }
    return tuple(sorted(largest | {(width, height)}))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Returns the bucket with the aspect ratio nearest to that of an image; of several, the largest."""
    width, height = size

    def distance(bucket: Size) -> tuple[float, int, Size]:
        return abs(math.log(bucket[0] / bucket[1] * height / width)), -bucket[0] * bucket[1], bucket

    return min(buckets, key=distance)


def upscale_factor(size: Size, target: Size) -> float:
    """Returns the factor that scales an image to cover `target`; above 1 the image is enlarged, and looks soft."""
    return max(target[0] / size[0], target[1] / size[1])
