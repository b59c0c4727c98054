"""Pictures written for people to look at."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer import files

SMALLEST = 192
"""Pixels a side; smaller pictures are enlarged by whole factors, without smoothing, so that their pixels can be seen."""


def save(path: Path, picture: np.ndarray) -> None:
    """A picture (H, W, 3) uint8 as PNG, atomically."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    files.write(path, buffer.getvalue())


def load(path: Path) -> np.ndarray:
    """A picture that `save` wrote."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def strip(pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) of one size side by side, each under its name, as one picture."""
    first = next(iter(pictures.values()))
    factor = max(1, -(-SMALLEST // min(first.shape[:2])))
    height, width = (side * factor for side in first.shape[:2])
    label, gap = max(20, height // 12), max(4, height // 48)
    sheet = Image.new("RGB", (len(pictures) * (width + gap) - gap, height + label), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(label * 0.7)
    for column, (name, picture) in enumerate(pictures.items()):
        left = column * (width + gap)
        pen.text((left + width / 2, label / 2), name, fill="black", font=font, anchor="mm")
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, label))
    return np.asarray(sheet)


def sheet(strips: list[np.ndarray]) -> np.ndarray:
    """Strips of one width under each other."""
    return np.concatenate(strips)
