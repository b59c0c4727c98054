"""CLIP similarity to the user's history."""

from __future__ import annotations

from typing import ClassVar

from trainer.evaluation.similarity import HistorySimilarity


class ClipHistory(HistorySimilarity):
    """Mean cosine similarity of an image and those that its user liked (Shen et al. 2024)."""

    title: ClassVar[str] = "CLIP similarity to the user's history"
    setting: ClassVar[str] = "clip"
