"""How well images fit texts, by a CLIP model of transformers (Radford et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.core.errors import WeightsError
from trainer.model.pretrained import quiet_libraries

if TYPE_CHECKING:
    import numpy as np
    import torch

SMALLEST = 1e-6
"""Similarities below are taken for this one, because scores are logarithms."""


class ClipScorer:
    """`path` is a folder or hub id of a CLIP model with its processor. Raises errors.WeightsError."""

    def __init__(self, path: str, device: torch.device):
        from transformers import CLIPModel, CLIPProcessor

        quiet_libraries()
        self.device = device
        try:
            self.processor: Any = CLIPProcessor.from_pretrained(path)
            model: Any = CLIPModel.from_pretrained(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise WeightsError(
                f"sample.clip={path} cannot be read as a CLIP model ({reason}); type a folder or a hub id such as "
                "openai/clip-vit-base-patch32"
            ) from error
        self.model = model.to(device).eval()

    def similarities(self, image: np.ndarray, texts: Sequence[str]) -> list[float]:
        """Returns the cosine similarity of an image (H, W, 3), uint8, and each text, cut to what CLIP reads."""
        import torch

        inputs = self.processor(
            text=list(texts),
            images=[image],
            padding=True,
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        )
        with torch.no_grad():
            found = self.model(**inputs.to(self.device))
        # Both have length 1.
        return (found.text_embeds @ found.image_embeds[0]).tolist()

    @property
    def _length(self) -> int:
        return self.model.config.text_config.max_position_embeddings


def preference_score(target: float, preference: float, share: float) -> float:
    """Returns share x log(preference) + (1 - share) x log(target), for similarities to the two (Shen et al. 2024)."""
    return share * math.log(max(preference, SMALLEST)) + (1 - share) * math.log(max(target, SMALLEST))
