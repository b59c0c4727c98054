"""What a network learns to predict: times, noising, loss and sampling of one formulation, in one file each."""

from __future__ import annotations

from trainer.objective.flow import Flow, Times

__all__ = ["Flow", "Times"]
