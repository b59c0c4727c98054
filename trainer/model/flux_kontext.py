"""FLUX.1 Kontext (Black Forest Labs 2025): FLUX's transformer with control images, which are further tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.model.flux.family import FluxFamily


@dataclass(slots=True)
class FluxKontext(FluxFamily):
    control_counts = range(10)

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import FluxKontextPipeline

        return FluxKontextPipeline
