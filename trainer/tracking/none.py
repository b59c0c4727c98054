"""`tracking=none`: a run is recorded in its own folder only."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.tracking import Tracking


@dataclass(slots=True)
class NoTracking(Tracking):
    """Tracks nothing beyond the run folder."""
