"""Settings of the regularization images, which keep a model from forgetting what it knew (prior preservation)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction

from trainer.core.errors import UsageError
from trainer.core.settings import path_setting


@dataclass(slots=True)
class Regularization:
    """Images that training visits beside those of the dataset, and that are never held out.

    As in DreamBooth (Ruiz et al. 2022), they show the class of a subject, usually as the model itself draws it: "a dog"
    beside "a photo of sks dog".
    """

    path: str | None = path_setting(None)
    """Folder of the images, in the layout of the dataset; null: there are none."""
    caption: str | None = None
    """Caption of all images; the folder then has images only."""
    share: float = 0.5
    """Share of the visits that are visits of these images."""
    weight: float = 1.0
    """Factor of their loss."""

    def __post_init__(self) -> None:
        if self.path is None and any(
            getattr(self, setting.name) != setting.default for setting in fields(Regularization)
        ):
            raise UsageError(
                "dataset.regularization has settings but no images: type dataset.regularization.path=FOLDER as well."
            )
        if not 0 < self.share < 1:
            raise UsageError(
                f"dataset.regularization.share={self.share:g} is not a share of a batch: type a number between 0 and "
                "1, such as 0.5."
            )
        if not 0 < self.weight < math.inf:
            raise UsageError(
                f"dataset.regularization.weight={self.weight:g} is not a weight of a loss: type a number above 0, or "
                "leave out dataset.regularization.path."
            )
        if self.caption is not None and not self.caption.strip():
            raise UsageError(
                "dataset.regularization.caption is empty: type what the images show, or leave it out if they have "
                "captions."
            )

    @property
    def visit_share(self) -> Fraction:
        """The share of the visits as typed, without the rounding of a float; 0 if there are no images."""
        return Fraction(str(self.share)) if self.path is not None else Fraction(0)
