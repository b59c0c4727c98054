"""CLIP similarity to the target."""

from __future__ import annotations

from typing import ClassVar

from trainer.evaluation.similarity import TargetSimilarity


class ClipSimilarity(TargetSimilarity):
    """Cosine similarity of the embeddings of image and target."""

    title: ClassVar[str] = "CLIP similarity to the target"
    setting: ClassVar[str] = "clip"
