"""Similarity of images by the embeddings of a vision model: base classes of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from trainer.evaluation.metrics import PictureMetric, Pictures, Setup, needs_model, needs_targets
from trainer.evaluation.vision import normalize


class TargetSimilarity(PictureMetric):
    """Cosine similarity of image and target by the model of the setting `setting`."""

    better: ClassVar[Literal["higher", "lower"] | None] = "higher"
    setting: ClassVar[str]

    def missing(self, setup: Setup, pictures: Pictures) -> str | None:
        return needs_targets(pictures) or needs_model(setup, self.setting)

    def model(self, setup: Setup) -> str | None:
        return self.setting

    def values(self, setup: Setup, pictures: Pictures) -> Sequence[float]:
        assert pictures.targets is not None
        images = normalize(setup.embed(self.setting, pictures.name, pictures.images))
        targets = normalize(setup.embed(self.setting, "targets", pictures.targets))
        return (images * targets).sum(1).tolist()


class SubjectSimilarity(PictureMetric):
    """Mean cosine similarity of an image and all training images by the model of the setting `setting`."""

    setting: ClassVar[str]

    def missing(self, setup: Setup, pictures: Pictures) -> str | None:
        return needs_model(setup, self.setting)

    def model(self, setup: Setup) -> str | None:
        return self.setting

    def values(self, setup: Setup, pictures: Pictures) -> Sequence[float]:
        images = normalize(setup.embed(self.setting, pictures.name, pictures.images))
        # The mean of the products is the product with the mean.
        return (images @ normalize(setup.embed_training(self.setting)).mean(0)).tolist()


class HistorySimilarity(PictureMetric):
    """Mean cosine similarity of an image and those that its user liked, by the model of the setting `setting`."""

    better: ClassVar[Literal["higher", "lower"] | None] = "higher"
    setting: ClassVar[str]

    def missing(self, setup: Setup, pictures: Pictures) -> str | None:
        if not pictures.histories:
            return "the dataset has no images that a user liked; dataset=personalized does"
        return needs_model(setup, self.setting)

    def model(self, setup: Setup) -> str | None:
        return self.setting

    def values(self, setup: Setup, pictures: Pictures) -> Sequence[float]:
        images = normalize(setup.embed(self.setting, pictures.name, pictures.images))
        values = []
        for prompt, image, history in zip(pictures.prompts, images, pictures.histories, strict=True):
            liked = normalize(setup.embed(self.setting, f"history of prompt {prompt}", history))
            values.append(float((liked @ image).mean()))
        return values
