"""Metrics of generated images. Each is a module of this package with a subclass of `Metric`, found by its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

from trainer.evaluation.vision import EXAMPLES, ClipModel, VisionModel

if TYPE_CHECKING:
    import numpy as np
    import torch

    Images = Sequence[np.ndarray]
    """Images (H, W, 3) uint8, perhaps read only when they are needed."""
    Statistic = Callable[[np.ndarray], float]
    """Returns the value of a metric for the pictures with some indices, which may occur several times."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures that one network generated, each for a prompt and a seed."""

    name: str
    images: Images
    captions: Sequence[str]
    prompts: Sequence[int]
    """Number of the prompt of each picture. Pictures of one prompt differ in their seed."""
    targets: Images | None
    """Target of each picture; None if they have none."""
    histories: Sequence[Images] = ()
    """For each picture the images that its user liked; empty if the dataset has none."""


@dataclass(slots=True)
class Setup:
    """What metrics use besides the pictures: models, each loaded once, and the images of the training split.

    `models` maps the settings `clip`, `dino` and `features` to a folder or hub id, or to None.
    """

    device: torch.device
    models: dict[str, str | None]
    lpips: str | None
    training: Images
    training_names: Sequence[str]
    _loaded: dict[str, VisionModel] = field(default_factory=dict)
    _embedded: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def first_model(self, *settings: str) -> str | None:
        """Returns the first of these settings that names a model."""
        return next((name for name in settings if self.models[name]), None)

    def model(self, name: str) -> VisionModel:
        """Returns the model of a setting. Raises errors.WeightsError."""
        if name not in self._loaded:
            path = self.models[name]
            assert path is not None
            kind = ClipModel if name == "clip" else VisionModel
            self._loaded[name] = kind(f"evaluation.{name}", path, self.device)
        return self._loaded[name]

    @property
    def clip(self) -> ClipModel:
        model = self.model("clip")
        assert isinstance(model, ClipModel)
        return model

    def embed(self, model: str, key: str, images: Images) -> np.ndarray:
        """Returns the embeddings (n, d) of images, computed once for each `key`."""
        if (model, key) not in self._embedded:
            self._embedded[model, key] = self.model(model).embed_images(images)
        return self._embedded[model, key]

    def embed_training(self, model: str) -> np.ndarray:
        return self.embed(model, "training images", self.training)


class Metric:
    """A measurement of generated images.

    Its name is that of its module. `title` and `unit` are for people. `better` says which values are better; None if
    that depends on what the images are for. Values come with an interval from `resamples` bootstrap samples.
    """

    title: ClassVar[str]
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower"] | None] = None
    resamples: ClassVar[int] = 1000

    def missing(self, setup: Setup, pictures: Pictures) -> str | None:
        """Returns why the metric is left out, and what to install or type; None if it can be measured."""
        return None

    def model(self, setup: Setup) -> str | None:
        """Returns the setting whose model it uses; None if it uses none."""
        return None

    def statistic(self, setup: Setup, pictures: Pictures) -> Statistic:
        """Returns the metric as a function of the pictures that are chosen."""
        raise NotImplementedError

    def notes(self, setup: Setup, pictures: Pictures) -> list[str]:
        """Returns a text about each picture for the report; empty for none."""
        return []


class PictureMetric(Metric):
    """A metric that is the mean of a value of each picture."""

    def values(self, setup: Setup, pictures: Pictures) -> Sequence[float]:
        """Returns the value of each picture."""
        raise NotImplementedError

    def statistic(self, setup: Setup, pictures: Pictures) -> Statistic:
        import numpy as np

        values = np.array(self.values(setup, pictures), np.float64)
        return lambda indices: values[indices].mean()


def needs_model(setup: Setup, *settings: str) -> str | None:
    """Returns what to type if none of these settings names a model."""
    if setup.first_model(*settings):
        return None
    key = f"evaluation.{settings[0]}"
    return f"type {key}=FOLDER, or a hub id such as {EXAMPLES[key]}"


def needs_targets(pictures: Pictures) -> str | None:
    """Returns why pictures cannot be compared with targets."""
    return "the prompts have no target images" if pictures.targets is None else None


@cache
def all_metrics() -> dict[str, Metric]:
    """Returns name -> metric for each module of this package."""
    found = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        members = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        classes = [c for c in members if isinstance(c, type) and issubclass(c, Metric)]
        (kind,) = (c for c in classes if c.__module__ == f"{__name__}.{module.name}")
        found[module.name] = kind()
    return found
