"""Image files for tests, good ones and bad ones."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (40, 32)


def random_image(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Returns 5 x 4 cells of random colors, which no other seed has."""
    rng = np.random.Generator(np.random.Philox(seed))
    return Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(size, Image.Resampling.NEAREST)


def save_image(path: Path, seed: int, size: tuple[int, int] = SIZE) -> Path:
    """Writes `random_image` to a file, whose folder it creates, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random_image(seed, size).save(path)
    return path


def decompression_bomb(width: int, height: int) -> bytes:
    """Returns a PNG of about a hundred bytes whose header claims this size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
