"""Control images as the language model sees them."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core.errors import DataError

if TYPE_CHECKING:
    from transformers import Qwen2VLImageProcessorPil

VISION_MULTIPLE = 32
"""Number of pixels by which the sides of resized images are divisible, as in the Plus pipeline."""


def vision_size(height: int, width: int, area: int) -> tuple[int, int]:
    """Returns (width, height) of about `area` pixels and the same aspect ratio.

    Equal to the Plus pipeline's `calculate_dimensions`.
    """
    ratio = width / height
    exact_width = math.sqrt(area * ratio)
    vision_width, vision_height = (
        max(1, round(side / VISION_MULTIPLE)) * VISION_MULTIPLE for side in (exact_width, exact_width / ratio)
    )
    return vision_width, vision_height


@cache
def load_image_processor(folder: Path) -> Qwen2VLImageProcessorPil:
    """Returns the processor that makes patches of images. Raises errors.DataError.

    It is always the variant without torchvision, so that cache entries do not depend on what is installed.
    """
    from transformers import Qwen2VLImageProcessorPil

    try:
        return Qwen2VLImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} cannot be read ({error}), so it is not part of a checkpoint of this model; type a different "
            "model.path"
        ) from error
