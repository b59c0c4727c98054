"""CLIP score: how well images fit their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from trainer.evaluation.metrics import PictureMetric, Pictures, Setup, needs_model
from trainer.evaluation.vision import normalize


class ClipScore(PictureMetric):
    """100 x the cosine similarity of image and prompt, at least 0 (Hessel et al. 2021, scaled as in torchmetrics)."""

    title: ClassVar[str] = "CLIP score"
    better: ClassVar[Literal["higher", "lower"] | None] = "higher"

    def missing(self, setup: Setup, pictures: Pictures) -> str | None:
        return needs_model(setup, "clip")

    def model(self, setup: Setup) -> str | None:
        return "clip"

    def values(self, setup: Setup, pictures: Pictures) -> Sequence[float]:
        images = normalize(setup.embed("clip", pictures.name, pictures.images))
        texts = normalize(setup.clip.embed_texts(pictures.captions))
        return [max(0.0, 100 * float(image @ text)) for image, text in zip(images, texts, strict=True)]
