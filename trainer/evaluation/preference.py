"""The score by which `stage=sample` chooses between images with different preference weights."""

from __future__ import annotations

import math

SMALLEST = 1e-6
"""Similarities below are taken for this one, because scores are logarithms."""


def preference_score(target: float, preference: float, share: float) -> float:
    """Returns share x log(preference) + (1 - share) x log(target), for similarities to the two (Shen et al. 2024)."""
    return share * math.log(max(preference, SMALLEST)) + (1 - share) * math.log(max(target, SMALLEST))
