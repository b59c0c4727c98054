"""Structural similarity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from trainer.evaluation.metrics import PictureMetric, Pictures, Setup, needs_targets

if TYPE_CHECKING:
    import numpy as np

RADIUS, SIGMA = 5, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(image: np.ndarray, target: np.ndarray) -> float:
    """Returns the structural similarity of two uint8 images (H, W, 3), at least 11 x 11; 1 if they are equal.

    Wang et al. 2004: Gaussian windows of 11 x 11 pixels that lie inside the image, here with the mean over the color
    channels, as scikit-image's `structural_similarity(gaussian_weights=True, use_sample_covariance=False)`.
    """
    import numpy as np

    x, y = image.astype(np.float64), target.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return float((luminance * structure).mean())


def _blur(image: np.ndarray) -> np.ndarray:
    """Returns the Gaussian mean of each window, (H - 10, W - 10, 3)."""
    import numpy as np

    weights = np.exp(-(np.arange(-RADIUS, RADIUS + 1) ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    rows = sum(w * image[i : len(image) - 2 * RADIUS + i] for i, w in enumerate(weights))
    return sum(w * rows[:, i : rows.shape[1] - 2 * RADIUS + i] for i, w in enumerate(weights))


class SSIM(PictureMetric):
    """SSIM to the target."""

    title: ClassVar[str] = "SSIM"
    better: ClassVar[Literal["higher", "lower"] | None] = "higher"

    def missing(self, setup: Setup, pictures: Pictures) -> str | None:
        return needs_targets(pictures)

    def values(self, setup: Setup, pictures: Pictures) -> Sequence[float]:
        assert pictures.targets is not None
        return [ssim(image, target) for image, target in zip(pictures.images, pictures.targets, strict=True)]
