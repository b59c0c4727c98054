"""Facts about the pixels of images: whether they can be decoded, and fingerprints that reveal near duplicates."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from trainer.core import documents
from trainer.core.errors import DataError
from trainer.dataset.decoding_memory import reserved
from trainer.dataset.sample import Sample
from trainer.dataset.source import Source

VERSION = 1
"""Increase this when images are decoded or fingerprinted differently: then all images are inspected again."""
BANDS = 4
"""Number of bands of the 64 edge bits. Fingerprints that differ in fewer bits than there are bands agree in at least
one band (pigeonhole principle), so only such pairs are compared.
"""
MAX_COLOR_DIFFERENCE = 12
"""Of 255. Largest mean difference between the 4 x 4 mean colors of near duplicates."""

Progress = Callable[[Sequence[Source]], Iterable[Source]]
"""Iterates over its argument, and may show a progress bar."""


@dataclass(slots=True, frozen=True)
class ImageFacts:
    """What is known about the pixels of an image.

    `fault` is the reason why the image cannot be used, if there is one. `edges` has 64 bits (dHash): whether each of
    8 x 8 cells is darker than the next. `colors` are the mean colors of 4 x 4 cells, RGB in hex.
    """

    fault: str | None = None
    edges: int = 0
    colors: str = ""


def inspect_images(samples: Iterable[Sample], progress: Progress) -> dict[Source, ImageFacts]:
    """Decodes every image of the samples, on all cores, and returns the facts about each."""
    sources = list(dict.fromkeys(source for sample in samples for source in sample_sources(sample)))
    # Threads are enough: decoders release the interpreter lock.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        futures = {source: pool.submit(inspect_image, source) for source in sources}
        return {source: futures[source].result() for source in progress(sources)}
    finally:
        pool.shutdown(cancel_futures=True)


def sample_sources(sample: Sample) -> list[Source]:
    """Returns all images of a sample."""
    return [sample.image, *sample.controls, *([sample.mask] if sample.mask else [])]


def inspect_image(source: Source) -> ImageFacts:
    """Returns the facts about an image, which is decoded only if they are not known yet."""
    facts = source.memoize(f"facts {VERSION}", lambda: json.dumps(_compute_facts(source)))
    return ImageFacts(*documents.parse_json(facts))


def _compute_facts(source: Source) -> list:
    """Returns the fields of `ImageFacts`."""
    from PIL import Image

    try:
        with reserved(source):
            image = source.open()
            small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
            colors = np.asarray(image.resize((4, 4), Image.Resampling.BOX))
            del image
    except DataError as error:
        # Facts depend on the content only, so the fault must not contain the name.
        return [str(error).removeprefix(f"{source.name}: ")]
    bits = (small[:, 1:] > small[:, :-1]).reshape(-1)
    return [None, int("".join("1" if bit else "0" for bit in bits), 2), colors.tobytes().hex()]


def find_near_duplicates(facts: Sequence[ImageFacts]) -> list[list[int]]:
    """Returns groups of indices of images that look the same, though their bytes may differ.

    Each image is compared with the first images of the groups found so far, and joins the first group that it
    resembles.
    """
    first_of: dict[int, int] = {}
    width = 64 // BANDS
    bands: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        keys = [(band, fact.edges >> band * width & (1 << width) - 1) for band in range(BANDS)]
        first = next((i for key in keys for i in bands[key] if _look_alike(facts[i], fact)), None)
        if first is None:
            for key in keys:
                bands[key].append(index)
        else:
            first_of[index] = first
    groups = defaultdict(list)
    for index, first in first_of.items():
        groups[first].append(index)
    return [[first, *members] for first, members in sorted(groups.items())]


def _look_alike(a: ImageFacts, b: ImageFacts) -> bool:
    if (a.edges ^ b.edges).bit_count() >= BANDS:
        return False
    colors = [np.frombuffer(bytes.fromhex(fact.colors), np.uint8).astype(np.int16) for fact in (a, b)]
    return float(np.abs(colors[0] - colors[1]).mean()) <= MAX_COLOR_DIFFERENCE
