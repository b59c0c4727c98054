"""Kernel distance of image sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainer.evaluation.distances import SetDistance

if TYPE_CHECKING:
    import numpy as np

    from trainer.evaluation.metrics import Statistic


class KID(SetDistance):
    """KID to the training images: the unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018)."""

    title: ClassVar[str] = "KID to the training images"
    resamples: ClassVar[int] = 300

    def distance(self, x: np.ndarray, y: np.ndarray) -> Statistic:
        import numpy as np

        def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return (a @ b.T / x.shape[1] + 1) ** 3

        within_x, within_y = kernel(x, x), kernel(y, y)
        between = kernel(x, y).mean(1)
        m = len(y)
        mean_y = (within_y.sum() - np.trace(within_y)) / (m * (m - 1))

        def statistic(indices: np.ndarray) -> float:
            n = len(indices)
            chosen = within_x[np.ix_(indices, indices)]
            mean_x = (chosen.sum() - np.trace(chosen)) / (n * (n - 1))
            return float(mean_x + mean_y - 2 * between[indices].mean())

        return statistic
