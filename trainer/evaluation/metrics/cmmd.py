"""CLIP maximum mean discrepancy of image sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainer.evaluation.distances import SetDistance
from trainer.evaluation.vision import normalize

if TYPE_CHECKING:
    import numpy as np

    from trainer.evaluation.metrics import Statistic

SIGMA, SCALE = 10, 1000


class CMMD(SetDistance):
    """CMMD to the training images (Jayasumana et al. 2024).

    1000 x the biased squared MMD of embeddings of length 1 with a Gaussian kernel of standard deviation 10, as in
    google-research/cmmd.
    """

    title: ClassVar[str] = "CMMD to the training images"
    resamples: ClassVar[int] = 300
    settings: ClassVar[tuple[str, ...]] = ("features", "clip", "dino")

    def distance(self, x: np.ndarray, y: np.ndarray) -> Statistic:
        import numpy as np

        x, y = normalize(x), normalize(y)

        def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            # |a - b|^2 = 2 - 2 a.b for vectors of length 1; expm1 keeps the digits of small distances.
            return np.expm1((a @ b.T - 1) / SIGMA**2)

        within_x, between = kernel(x, x), kernel(x, y).mean(1)
        mean_y = kernel(y, y).mean()

        def statistic(indices: np.ndarray) -> float:
            mean_x = within_x[np.ix_(indices, indices)].mean()
            return float(SCALE * (mean_x + mean_y - 2 * between[indices].mean()))

        return statistic
