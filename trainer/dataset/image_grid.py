"""Images for people to look at: PNG files, grids with a label above each image, contact sheets."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.core import files

MIN_SIDE = 192
"""In pixels. Smaller images are enlarged by a whole factor, without smoothing, so that their pixels can be seen."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def save_png(path: Path, image: np.ndarray) -> None:
    """Writes an image (H, W, 3) uint8 atomically. Raises errors.StorageError."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    files.write(path, buffer.getvalue())


def load_png(path: Path) -> np.ndarray:
    """Returns an image (H, W, 3) uint8 that `save_png` wrote."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def label_grid(images: Mapping[str, np.ndarray], columns: int | None = None) -> np.ndarray:
    """Returns images (H, W, 3) of one size as one image, each below its label.

    `columns` is the number of images per row; None: all in one row.
    """
    columns = columns or len(images)
    first = next(iter(images.values()))
    factor = max(1, -(-MIN_SIDE // min(first.shape[:2])))
    height, width = (side * factor for side in first.shape[:2])
    label, gap = max(20, height // 12), max(4, height // 48)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + label)), "white")
    pen = ImageDraw.Draw(grid)
    font = ImageFont.load_default(label * 0.7)
    for number, (name, image) in enumerate(images.items()):
        left, top = number % columns * (width + gap), number // columns * (height + label)
        pen.text((left + width / 2, top + label / 2), name, fill="black", font=font, anchor="mm")
        grid.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top + label))
    return np.asarray(grid)


def stack_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Returns images of one width as one image, one below the other."""
    return np.concatenate(rows)


def add_caption(image: np.ndarray, text: str) -> np.ndarray:
    """Returns an image (H, W, 3) uint8 with text below it, in as many lines as its width needs."""
    font = ImageFont.load_default(14)
    line_height = int(font.getbbox("Ag")[3]) + 2
    lines = _wrap(text, font, image.shape[1] - 8, max_lines=4)
    result = Image.new("RGB", (image.shape[1], image.shape[0] + line_height * len(lines) + 6), "white")
    result.paste(Image.fromarray(image), (0, 0))
    pen = ImageDraw.Draw(result)
    for number, line in enumerate(lines):
        pen.text((4, image.shape[0] + 3 + number * line_height), line, fill="black", font=font)
    return np.asarray(result)


def contact_sheet(
    cells: Sequence[tuple[Sequence[np.ndarray], str]], columns: int = 4, side: int = 192, lines: int = 3
) -> np.ndarray:
    """Returns cells of images (H, W, 3) of any size as one image, `columns` cells per row.

    A cell shows its images side by side, with the longer side scaled to `side` pixels, above at most `lines` lines of
    text.
    """
    font = ImageFont.load_default(12)
    line_height = int(font.getbbox("Ag")[3]) + 2
    width = max(sum(side + 4 for _ in images) for images, _ in cells) + 8
    height = side + lines * line_height + 12
    sheet = Image.new("RGB", (width * min(columns, len(cells)), height * -(-len(cells) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (images, text) in enumerate(cells):
        left, top = number % columns * width, number // columns * height
        for position, pixels in enumerate(images):
            image = Image.fromarray(pixels)
            factor = side / max(image.size)
            size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
            resampling = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
            sheet.paste(image.resize(size, resampling), (left + position * (side + 4), top))
        for line, words in enumerate(_wrap(text, font, width - 8, lines)):
            pen.text((left, top + side + 2 + line * line_height), words, fill="black", font=font)
    return np.asarray(sheet)


def _wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels, and returns the first of them."""
    lines = [""]
    for word in text[:400].split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:max_lines]


def encode_for_page(path: Path, max_side: int) -> tuple[bytes, str, bool]:
    """Returns an image file for a web page, its kind (png or jpeg), and whether it is so small that its pixels show.

    Large images are scaled down and compressed.
    """
    with Image.open(path) as image:
        is_small = max(image.size) < MIN_SIDE
        if image.format == "PNG" and max(image.size) <= min(max_side, 2 * MIN_SIDE):
            return path.read_bytes(), "png", is_small
        scaled = image.convert("RGB")
    scaled.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    scaled.save(buffer, "JPEG", quality=88)
    return buffer.getvalue(), "jpeg", is_small
