"""Pictures and samples that tests make out of nothing, and where networks are tried."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from trainer.core import rng
from trainer.dataset import Sample
from trainer.dataset.view import TransformedSample

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
"""Where parity and precision are tested: TEST_DEVICE=cuda does it on a GPU."""
# What a GPU takes for float32 is none unless it is told so.
torch.backends.cudnn.allow_tf32 = False


def normal(shape: tuple[int, ...], *key: object) -> torch.Tensor:
    """The same numbers on every device; see `trainer.core.rng.normal`."""
    return rng.normal(shape, *key).to(DEVICE)


@dataclass(slots=True, frozen=True)
class Noise:
    """A picture of random pixels that its name decides; see `trainer.dataset.sample.Source`."""

    name: str
    width: int
    height: int

    def pixels(self) -> np.ndarray:
        return rng.generator("picture", self.name).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)

    def open(self) -> Image.Image:
        return Image.fromarray(self.pixels())

    def digest(self) -> str:
        return f"{self.name} {self.width} {self.height}"

    def size(self) -> tuple[int, int]:
        return self.width, self.height


def view(caption: str, width: int, height: int, controls: int = 0) -> TransformedSample:
    """A sample of noise, seen at its own size; its controls depend on the caption, its target does not."""
    sources = tuple(Noise(f"control {i} {caption}", width, height) for i in range(controls))
    return TransformedSample(Sample(caption, Noise("target", width, height), caption, sources), width, height)
