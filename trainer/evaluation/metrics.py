"""Metrics that compare generated images with their targets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of two uint8 images (H, W, 3) in dB; 99 if they are equal."""
    import numpy as np

    error = float(np.mean((image.astype(np.float64) - target) ** 2))
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)
