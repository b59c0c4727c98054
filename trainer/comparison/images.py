"""The images of a comparison: generated once for each network, kept in the folder of its run, and read when needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, overload

from trainer.comparison.subjects import Subject
from trainer.core import files
from trainer.core.bars import ProgressBar
from trainer.core.version import __version__
from trainer.dataset.source import Source
from trainer.dataset.transform import TransformedSample
from trainer.training.data import TrainingData
from trainer.training.evaluator import Evaluator

if TYPE_CHECKING:
    import numpy as np


class LazyImages(Sequence["np.ndarray"]):
    """Images (H, W, 3) uint8 that are read each time they are asked for, since thousands may not fit into memory."""

    def __init__(self, readers: Sequence[Callable[[], np.ndarray]]):
        self._readers = readers

    def __len__(self) -> int:
        return len(self._readers)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> LazyImages: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | LazyImages:
        return LazyImages(self._readers[index]) if isinstance(index, slice) else self._readers[index]()


def image_paths(subject: Subject, samples: Sequence[TransformedSample], seeds: Sequence[int]) -> list[Path]:
    """Returns the file of the image of each sample and seed.

    The name of the folder is a hash of everything that decides the images besides the weights.
    """
    settings = subject.run.sample
    request = [
        __version__,
        settings.steps,
        settings.guidance,
        [
            [
                sample.caption,
                dict(sample.sample.texts),
                sample.content_key("controls"),
                sample.width,
                sample.height,
                seed,
            ]
            for sample, seed in zip(samples, seeds, strict=True)
        ],
    ]
    name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    folder = subject.evaluation_folder / f"images-{name}"
    return [folder / f"{number:05d}.png" for number in range(len(samples))]


def generate_missing(
    evaluator: Evaluator, paths: Sequence[Path], samples: Sequence[TransformedSample], seeds: Sequence[int], name: str
) -> None:
    """Generates the images that do not exist yet, and writes metadata.jsonl beside them.

    The cache must contain the samples and their `unconditional_samples`. The folder can be read as a dataset.
    """
    from trainer.dataset import image_grid

    missing = [i for i, path in enumerate(paths) if not path.exists()]
    images = evaluator.generate([samples[i] for i in missing], [seeds[i] for i in missing])
    progress = ProgressBar(images, total=len(missing), desc=f"images of {name}", unit="image", disable=not missing)
    with closing(images), progress:
        for index, image in progress:
            image_grid.save_png(paths[missing[index]], image)
    lines = [
        json.dumps({"file_name": path.name, "text": sample.caption, "seed": seed, "sample": sample.sample.id})
        for path, sample, seed in zip(paths, samples, seeds, strict=True)
    ]
    if paths:
        files.write(paths[0].parent / "metadata.jsonl", "\n".join(lines) + "\n")


def read_images(paths: Sequence[Path]) -> LazyImages:
    """Returns images that are read when they are needed, which raises errors.DataError if a file is damaged."""

    def reader(path: Path) -> Callable[[], np.ndarray]:
        return lambda: read_image(path)

    return LazyImages([reader(path) for path in paths])


def read_image(path: Path) -> np.ndarray:
    """Returns an image of a comparison. Raises errors.DataError, StorageError."""
    from trainer.dataset import image_grid

    with files.library_errors(path, "Delete it, and type the same stage=evaluate command again to generate it"):
        return image_grid.load_png(path)


def sample_images(samples: Sequence[TransformedSample], name: str = "image") -> LazyImages:
    """Returns the targets of samples, or other images by their name."""

    def reader(sample: TransformedSample) -> Callable[[], np.ndarray]:
        return lambda: sample.pixels(name)

    return LazyImages([reader(sample) for sample in samples])


def history_images(sample: TransformedSample) -> LazyImages:
    """Returns the images that the user of a sample liked, at the size of its target."""

    def reader(source: Source) -> Callable[[], np.ndarray]:
        from trainer.dataset.image import fit

        return lambda: fit(source.open(), sample.width, sample.height, False)

    return LazyImages([reader(source) for source in sample.sample.history])


def training_images(data: TrainingData, count: int) -> list[TransformedSample]:
    """Returns at most `count` training samples, the first in the order of the hashes of their ids."""
    by_hash = sorted(data.split.train, key=lambda sample: hashlib.sha256(sample.id.encode()).digest())
    return [data.transform.apply(sample) for sample in by_hash[:count]]


def numbered(images: Sequence[np.ndarray]) -> Generator[tuple[int, np.ndarray]]:
    """Yields (index, image), as `Evaluator.generate` does."""
    yield from enumerate(images)
