"""Synthetic samples and tensors for tests of networks, and the device of these tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from trainer.core import rng
from trainer.dataset.sample import Sample
from trainer.dataset.transform import TransformedSample

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
"""Where parity and precision are tested; TEST_DEVICE=cuda for a GPU."""
# By default, convolutions on a GPU compute float32 in TF32, which is less precise.
torch.backends.cudnn.allow_tf32 = False


def normal(shape: tuple[int, ...], *key: int | str) -> torch.Tensor:
    """Returns standard normal numbers on DEVICE, the same on every device; see `trainer.core.rng.normal`."""
    return rng.normal(shape, *key).to(DEVICE)


@dataclass(slots=True, frozen=True)
class NoiseSource:
    """An image of random pixels that depend on its name only; see `trainer.dataset.source.Source`."""

    name: str
    width: int
    height: int

    def pixels(self) -> np.ndarray:
        return rng.generator("picture", self.name).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)

    def open(self) -> Image.Image:
        return Image.fromarray(self.pixels())

    def digest(self) -> str:
        return f"{self.name} {self.width} {self.height}"

    def memoize(self, key: str, compute: Callable[[], str]) -> str:
        return compute()

    def size(self) -> tuple[int, int]:
        return self.width, self.height


def noise_sample(caption: str, width: int, height: int, controls: int = 0) -> TransformedSample:
    """Returns a sample of noise at its own size. Its control images depend on the caption, its target does not."""
    sources = tuple(NoiseSource(f"control {i} {caption}", width, height) for i in range(controls))
    return TransformedSample(Sample(caption, NoiseSource("target", width, height), caption, sources), width, height)
