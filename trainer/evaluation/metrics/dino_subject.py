"""DINO similarity to the training images."""

from __future__ import annotations

from typing import ClassVar

from trainer.evaluation.similarity import SubjectSimilarity


class DinoSubject(SubjectSimilarity):
    """Mean cosine similarity of an image and the training images (DINO of Ruiz et al. 2023)."""

    title: ClassVar[str] = "DINO similarity to the training images"
    setting: ClassVar[str] = "dino"
