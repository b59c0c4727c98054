"""DINO similarity to the target."""

from __future__ import annotations

from typing import ClassVar

from trainer.evaluation.similarity import TargetSimilarity


class DinoSimilarity(TargetSimilarity):
    """Cosine similarity of the embeddings of image and target."""

    title: ClassVar[str] = "DINO similarity to the target"
    setting: ClassVar[str] = "dino"
