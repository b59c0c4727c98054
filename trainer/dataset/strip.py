"""Pictures written for people to look at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.core import files

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


def strip(pictures: Mapping[str, np.ndarray], across: int | None = None) -> np.ndarray:
    """Pictures (H, W, 3) of one size, each under its name, as one picture: `across` a row (null: all side by side)."""
    across = across or len(pictures)
    first = next(iter(pictures.values()))
    factor = max(1, -(-SMALLEST // min(first.shape[:2])))
    height, width = (side * factor for side in first.shape[:2])
    label, gap = max(20, height // 12), max(4, height // 48)
    sheet = Image.new("RGB", (across * (width + gap) - gap, -(-len(pictures) // across) * (height + label)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(label * 0.7)
    for number, (name, picture) in enumerate(pictures.items()):
        left, top = number % across * (width + gap), number // across * (height + label)
        pen.text((left + width / 2, top + label / 2), name, fill="black", font=font, anchor="mm")
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, top + label))
    return np.asarray(sheet)


def sheet(strips: list[np.ndarray]) -> np.ndarray:
    """Strips of one width under each other."""
    return np.concatenate(strips)


def contact(
    cells: Sequence[tuple[Sequence[np.ndarray], str]], across: int = 4, side: int = 192, lines: int = 3
) -> np.ndarray:
    """Pictures (H, W, 3) of any sizes with a text under each group, `across` groups a row."""
    font = ImageFont.load_default(12)
    height = font.getbbox("Ag")[3] + 2
    wide = max(sum(side + 4 for _ in pictures) for pictures, _ in cells) + 8
    tall = side + lines * height + 12
    sheet = Image.new("RGB", (wide * min(across, len(cells)), tall * -(-len(cells) // across)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (pictures, text) in enumerate(cells):
        left, top = number % across * wide, number // across * tall
        for column, picture in enumerate(pictures):
            image = Image.fromarray(picture)
            factor = side / max(image.size)
            kind = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
            sheet.paste(
                image.resize([max(1, round(length * factor)) for length in image.size], kind),
                (left + column * (side + 4), top),
            )
        for line, words in enumerate(_wrapped(text, font, wide - 8, lines)):
            pen.text((left, top + side + 2 + line * height), words, fill="black", font=font)
    return np.asarray(sheet)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """The text in at most so many lines of at most so many pixels."""
    rows = [""]
    for word in text[:400].split():
        longer = f"{rows[-1]} {word}".strip()
        if rows[-1] and font.getlength(longer) > width:
            rows.append(word)
        else:
            rows[-1] = longer
    return rows[:lines]
