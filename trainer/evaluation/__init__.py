"""Evaluation on held-out samples: settings here; losses, metrics and generated images in modules of their own."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.core.errors import UsageError
from trainer.core.settings import path_setting

LPIPS_NETWORKS = ("alex", "vgg", "squeeze")


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

    against: list[str] = field(default_factory=lambda: ["base"], metadata=path_setting().metadata)
    """What `stage=evaluate` compares the run with: ids or folders of other runs, and `base` for the network before
    training (`base:ID` for that of another run)."""
    metrics: list[str] | None = None
    """Names of the metrics of `stage=evaluate`, the modules of `trainer.evaluation.metrics`; null: all that can be
    measured."""
    clip: str | None = path_setting(None)
    """Folder or hub id of a CLIP or SigLIP model, which compares images with prompts and with each other."""
    dino: str | None = path_setting(None)
    """Folder or hub id of a DINOv2 or other vision model, which compares images with each other."""
    features: str | None = path_setting(None)
    """Folder or hub id of the vision model for distances to the training images; null: `dino` or `clip`."""
    lpips: str | None = None
    """Network of LPIPS: alex, vgg or squeeze; null: it is not measured. torchvision downloads its weights."""
    training_images: int = 1000
    """Largest number of training images with which `stage=evaluate` compares the generated ones."""

    def __post_init__(self) -> None:
        if self.lpips is not None and self.lpips not in LPIPS_NETWORKS:
            raise UsageError(f"evaluation.lpips={self.lpips} is unknown; type {', '.join(LPIPS_NETWORKS)} or null")
        for name, minimum in (
            ("every", 1),
            ("samples", 1),
            ("images", 0),
            ("shown", 0),
            ("images_per_prompt", 1),
            ("patience", 1),
            ("training_images", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UsageError(f"evaluation.{name}={value} is too small; type {minimum} or more")
