"""Frechet distance of image sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from trainer.evaluation.distances import SetDistance

if TYPE_CHECKING:
    import numpy as np

    from trainer.evaluation.metrics import Statistic


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the Frechet distance of Gaussians fitted to two sets of vectors (n, d) and (m, d) (Heusel et al. 2017).

    |mean x - mean y|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)). The trace of the root is the sum of the singular values of
    X Y^T for centered sets X, Y, which needs no root of a d x d matrix.
    """
    import numpy as np

    a, b = ((z - z.mean(0)) / np.sqrt(max(len(z) - 1, 1)) for z in (x, y))
    # The triangular factor has the same covariance, and at most d rows.
    small: list[Any] = [np.linalg.qr(z, mode="r") if len(z) > z.shape[1] else z for z in (a, b)]
    root = np.linalg.svd(small[0] @ small[1].T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root)


class FID(SetDistance):
    """FID to the training images. Values are comparable for the same model and number of images only."""

    title: ClassVar[str] = "FID to the training images"
    resamples: ClassVar[int] = 100

    def distance(self, x: np.ndarray, y: np.ndarray) -> Statistic:
        return lambda indices: frechet_distance(x[indices], y)
