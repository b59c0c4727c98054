"""Diversity of the images of one prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from trainer.evaluation.metrics import PictureMetric, Pictures, Setup, needs_model
from trainer.evaluation.vision import normalize

MODELS = ("features", "dino", "clip")


class Diversity(PictureMetric):
    """Mean cosine distance of an image to the others of its prompt, which differ in the seed; 0 if all are equal."""

    title: ClassVar[str] = "diversity over seeds"

    def missing(self, setup: Setup, pictures: Pictures) -> str | None:
        if min(Counter(pictures.prompts).values()) < 2:
            return "each prompt has one image; type evaluation.images_per_prompt=4"
        return needs_model(setup, "dino", "features", "clip")

    def model(self, setup: Setup) -> str | None:
        return setup.first_model(*MODELS)

    def values(self, setup: Setup, pictures: Pictures) -> Sequence[float]:
        import numpy as np

        name = setup.first_model(*MODELS)
        assert name is not None
        embeddings = normalize(setup.embed(name, pictures.name, pictures.images).astype(np.float64))
        prompts = np.array(pictures.prompts)
        values = []
        for i, prompt in enumerate(prompts):
            others = embeddings[(prompts == prompt) & (np.arange(len(prompts)) != i)]
            values.append(float(1 - (others @ embeddings[i]).mean()))
        return values
