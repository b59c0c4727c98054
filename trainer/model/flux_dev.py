"""FLUX.1 [dev] (Black Forest Labs 2024): images from texts, by a transformer that was distilled with guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.model.flux.family import FluxFamily


@dataclass(slots=True)
class FluxDev(FluxFamily):
    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import FluxPipeline

        return FluxPipeline
