"""Distance to the nearest training image, which shows whether a run has memorized its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from trainer.evaluation.metrics import PictureMetric, Pictures, Setup, needs_model
from trainer.evaluation.vision import normalize

if TYPE_CHECKING:
    import numpy as np

MODELS = ("features", "dino", "clip")


class Nearest(PictureMetric):
    """Distance of an image to the nearest training image; near 0 is a copy.

    The distance is 1 - the cosine similarity of the embeddings. Without a model it is the root of the mean squared
    difference of the pixels, 0 to 1, of training images that have the size of the image.
    """

    title: ClassVar[str] = "distance to the nearest training image"

    def missing(self, setup: Setup, pictures: Pictures) -> str | None:
        sizes = {image.shape for image in setup.training}
        if self.model(setup) or {image.shape for image in pictures.images} <= sizes:
            return None
        return f"the training images have other sizes; {needs_model(setup, 'dino', *MODELS)}"

    def model(self, setup: Setup) -> str | None:
        return setup.first_model(*MODELS)

    def values(self, setup: Setup, pictures: Pictures) -> Sequence[float]:
        return [distance for distance, _ in self._nearest(setup, pictures)]

    def notes(self, setup: Setup, pictures: Pictures) -> list[str]:
        return [
            f"nearest: {setup.training_names[index]} ({distance:.3g})"
            for distance, index in self._nearest(setup, pictures)
        ]

    def _nearest(self, setup: Setup, pictures: Pictures) -> list[tuple[float, int]]:
        """Returns for each picture the distance to the nearest training image, and its index."""
        import numpy as np

        name = self.model(setup)
        if name is None:
            return [_nearest_pixels(image, setup.training) for image in pictures.images]
        training = normalize(setup.embed_training(name).astype(np.float64))
        distances = 1 - normalize(setup.embed(name, pictures.name, pictures.images).astype(np.float64)) @ training.T
        return [(float(row.min()), int(row.argmin())) for row in distances]


def _nearest_pixels(image: np.ndarray, training: Sequence[np.ndarray]) -> tuple[float, int]:
    import numpy as np

    return min(
        (float(np.sqrt(np.mean((image.astype(np.float32) - other) ** 2))) / 255, index)
        for index, other in enumerate(training)
        if other.shape == image.shape
    )
