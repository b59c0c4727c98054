"""Bootstrap intervals of measurements, and whether two of them differ by more than chance.

Pictures of one prompt resemble each other, so whole prompts are drawn (a cluster bootstrap; Efron & Tibshirani 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from trainer.core.rng import generator

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95
FEW_PROMPTS = 8
"""With fewer prompts, bootstrap intervals are too narrow."""


class Estimate(NamedTuple):
    """A value with its 95 % interval, whose ends are None if there is only one prompt."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def resample(prompts: Sequence[int], count: int) -> list[np.ndarray]:
    """Returns `count` bootstrap samples as indices of pictures; none if all pictures have the same prompt.

    `prompts` says which prompt each picture belongs to. The samples are the same in each call, so two sets of pictures
    of the same prompts are compared in pairs.
    """
    import numpy as np

    pictures: dict[int, list[int]] = {}
    for picture, prompt in enumerate(prompts):
        pictures.setdefault(prompt, []).append(picture)
    groups = [np.array(group) for group in pictures.values()]
    if len(groups) < 2:
        return []
    drawn = generator("bootstrap", len(groups)).integers(len(groups), size=(count, len(groups)))
    return [np.concatenate([groups[i] for i in row]) for row in drawn]


def estimate(statistic: Callable[[np.ndarray], float], prompts: Sequence[int], resamples: int) -> Estimate:
    """Returns a statistic of all pictures with its interval. `statistic(indices of pictures)` is its value of some.

    The distance of a set of images from another one grows when images occur twice, as in a bootstrap sample. So the
    interval takes only the spread of the bootstrap values around their own mean, and not their position.
    """
    import numpy as np

    value = float(statistic(np.arange(len(prompts))))
    values = np.array([statistic(indices) for indices in resample(prompts, resamples)])
    if not len(values):
        return Estimate(value)
    ends = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) - values.mean()
    return Estimate(value, value + float(ends[0]), value + float(ends[1]))
