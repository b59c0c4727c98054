"""Distance of two sets of images by the embeddings of a vision model: base class of metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from trainer.evaluation.metrics import Metric, Pictures, Setup, needs_model

if TYPE_CHECKING:
    import numpy as np

    from trainer.evaluation.metrics import Statistic


class SetDistance(Metric):
    """Distance of the pictures from the training images by the first model of `settings`."""

    better: ClassVar[Literal["higher", "lower"] | None] = "lower"
    settings: ClassVar[tuple[str, ...]] = ("features", "dino", "clip")

    def missing(self, setup: Setup, pictures: Pictures) -> str | None:
        if min(len(pictures.images), len(setup.training)) < 2:
            return "it needs two images or more; type evaluation.images=32"
        return needs_model(setup, *self.settings)

    def model(self, setup: Setup) -> str | None:
        return setup.first_model(*self.settings)

    def statistic(self, setup: Setup, pictures: Pictures) -> Statistic:
        import numpy as np

        name = self.model(setup)
        assert name is not None
        return self.distance(
            setup.embed(name, pictures.name, pictures.images).astype(np.float64),
            setup.embed_training(name).astype(np.float64),
        )

    def distance(self, x: np.ndarray, y: np.ndarray) -> Statistic:
        """Returns the distance of some of the embeddings `x` (n, d) from all of `y` (m, d)."""
        raise NotImplementedError
