"""Evaluation on held-out samples: settings here; losses, metrics and generated images in modules of their own."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.core.errors import UsageError


@dataclass(slots=True)
class Evaluation:
    """When and on how many samples a run is evaluated."""

    every: int | None = None
    """Steps between two evaluations; null: a quarter of the run, but at least 10 steps."""
    samples: int = 32
    """Largest number of held-out samples for the loss."""
    images: int | None = None
    """Number of images that are generated and compared with their targets; null: the model's default."""
    shown: int = 4
    """Number of generated images that are saved and logged."""
    prompts: list[str] | None = None
    """Prompts to generate images for; null: the captions of held-out samples."""
    images_per_prompt: int = 1
    """Number of images for each of `prompts`."""
    patience: int | None = None
    """Number of evaluations without a new best loss after which the run ends; null: it never ends early."""

    def __post_init__(self) -> None:
        for name, minimum in (
            ("every", 1),
            ("samples", 1),
            ("images", 0),
            ("shown", 0),
            ("images_per_prompt", 1),
            ("patience", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UsageError(f"evaluation.{name}={value} is too small; type {minimum} or more")
