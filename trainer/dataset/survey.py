"""A look at every picture of a data set: whether it can be decoded, and what near duplicates are told by."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from trainer.core.errors import DataError
from trainer.dataset.sample import Sample, Source

VERSION = 1
"""To be raised when pictures are decoded or fingerprinted in another way: all are then looked at again."""
BANDS = 4
"""Of the fingerprint's 64 bits. Two that differ in fewer bits than there are bands agree in one band (pigeonhole), so only these are compared."""
COLOUR = 12
"""Of 255: by how much the means of two near duplicates may differ in a cell of 4 x 4, on average."""


@dataclass(slots=True, frozen=True)
class Facts:
    """`fault`: why the picture cannot be used. `edges`: 64 bits, whether each of 8 x 8 cells is darker than the next (dHash). `colours`: 4 x 4 RGB."""

    fault: str | None = None
    edges: int = 0
    colours: str = ""


def inspect(source: Source) -> Facts:
    """Decode a picture, or remember that it was."""
    return Facts(*json.loads(source.remember(f"facts {VERSION}", lambda: json.dumps(_look(source)))))


def _look(source: Source) -> list:
    try:
        image = source.open()
    except DataError as error:
        # Without the name, which is no part of the content.
        return [str(error).removeprefix(f"{source.name}: ")]
    from PIL import Image

    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (small[:, 1:] > small[:, :-1]).reshape(-1)
    colours = np.asarray(image.resize((4, 4), Image.Resampling.BOX))
    return [None, int("".join("1" if bit else "0" for bit in bits), 2), colours.tobytes().hex()]


def sources(sample: Sample) -> list[Source]:
    """All pictures of a sample."""
    return [sample.image, *sample.controls, *([sample.mask] if sample.mask else [])]


def inspected(
    samples: Iterable[Sample], progress: Callable[[Sequence[Source]], Iterable[Source]]
) -> dict[Source, Facts]:
    """The facts of every picture of the samples, looked at on all cores; `progress` hands on what it is given and may show how far it is."""
    wanted = list(dict.fromkeys(source for sample in samples for source in sources(sample)))
    # Decoders leave the interpreter to other threads.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        looks = {source: pool.submit(inspect, source) for source in wanted}
        return {source: looks[source].result() for source in progress(wanted)}
    finally:
        pool.shutdown(cancel_futures=True)


def near_duplicates(facts: Sequence[Facts]) -> list[list[int]]:
    """Groups of indices of pictures that look the same, though their bytes may differ: each joined to the first that it is like."""
    first: dict[int, int] = {}
    width = 64 // BANDS
    bands: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        keys = [(band, fact.edges >> band * width & (1 << width) - 1) for band in range(BANDS)]
        other = next((i for key in keys for i in bands[key] if _alike(facts[i], fact)), None)
        if other is None:
            for key in keys:
                bands[key].append(index)
        else:
            first[index] = other
    groups = defaultdict(list)
    for index, other in first.items():
        groups[other].append(index)
    return [[other, *members] for other, members in sorted(groups.items())]


def _alike(a: Facts, b: Facts) -> bool:
    if (a.edges ^ b.edges).bit_count() >= BANDS:
        return False
    colours = [np.frombuffer(bytes.fromhex(fact.colours), np.uint8).astype(np.int16) for fact in (a, b)]
    return float(np.abs(colours[0] - colours[1]).mean()) <= COLOUR
