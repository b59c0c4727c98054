"""A limit on the memory of all images that the threads of this process decode at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.dataset.source import Source

BYTES_PER_PIXEL = 12
"""An upper bound of what decoding takes: Pillow stores the pixels of up to three images at a time in 4 bytes each."""
LIMIT = 2**31
"""In bytes. As much as the largest image that is accepted; of photographs of 12 million pixels, 14 at a time."""

_condition = threading.Condition()
_used = 0


@contextmanager
def reserved(source: Source) -> Iterator[None]:
    """Waits until there is memory for an image. Decode it and let go of its pixels inside the block.

    The size is that of the header, so nothing is decoded before. An image that needs more than the limit is decoded
    alone. Raises errors.DataError if the header cannot be read.
    """
    global _used
    width, height = source.size()
    needed = min(LIMIT, BYTES_PER_PIXEL * width * height)
    with _condition:
        _condition.wait_for(lambda: _used + needed <= LIMIT)
        _used += needed
    try:
        yield
    finally:
        with _condition:
            _used -= needed
            _condition.notify_all()
