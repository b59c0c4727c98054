"""CLIP similarity to the training images."""

from __future__ import annotations

from typing import ClassVar

from trainer.evaluation.similarity import SubjectSimilarity


class ClipSubject(SubjectSimilarity):
    """Mean cosine similarity of an image and the training images (CLIP-I of Ruiz et al. 2023)."""

    title: ClassVar[str] = "CLIP similarity to the training images"
    setting: ClassVar[str] = "clip"
