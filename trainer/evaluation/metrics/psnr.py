"""Peak signal-to-noise ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from trainer.evaluation.metrics import PictureMetric, Pictures, Setup, needs_targets

if TYPE_CHECKING:
    import numpy as np


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of two uint8 images (H, W, 3) in dB; 99 if they are equal."""
    import numpy as np

    error = float(np.mean((image.astype(np.float64) - target) ** 2))
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


class PSNR(PictureMetric):
    """PSNR to the target."""

    title: ClassVar[str] = "PSNR"
    unit: ClassVar[str] = "dB"
    better: ClassVar[Literal["higher", "lower"] | None] = "higher"

    def missing(self, setup: Setup, pictures: Pictures) -> str | None:
        return needs_targets(pictures)

    def values(self, setup: Setup, pictures: Pictures) -> Sequence[float]:
        assert pictures.targets is not None
        return [psnr(image, target) for image, target in zip(pictures.images, pictures.targets, strict=True)]
