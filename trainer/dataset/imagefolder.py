"""The layout imagefolder: metadata.jsonl, one JSON object a line, beside its pictures or beside the images/ that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core.errors import DataError
from trainer.core.files import Digests, storage
from trainer.dataset.reading import Listing, Reading, sides
from trainer.dataset.table import Row, collect, lines, unique

if TYPE_CHECKING:
    from trainer.dataset import ImageFolder

TABLE = "metadata.jsonl"


def read(settings: ImageFolder, digests: Digests) -> Listing:
    """One sample a line; FOLDER itself, or FOLDER/train and FOLDER/validation. Raises errors.DataError where there is no table."""
    reading = Reading(settings.folder(), digests)
    parts = sides(reading, lambda folder: (folder / TABLE).is_file())
    if not parts:
        example = json.dumps({settings.image_column: "NAME.jpg", settings.caption_column: "what it shows"})
        raise DataError(
            f"dataset.path={settings.path}: there is no {TABLE} in it, with a line like {example} for each picture."
        )
    for folder, split in parts:
        collect(reading, settings, _rows(folder / TABLE, reading), folder, split)
    return reading.listing()


def _rows(table: Path, reading: Reading) -> Iterator[tuple[str, Row | ValueError]]:
    with storage("read", table):
        data = table.read_bytes()
    for number, line in lines(data):
        place = f"{reading.name(table)} line {number}"
        try:
            row = json.loads(line.decode(), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            yield place, ValueError(error)
            continue
        yield place, row if isinstance(row, dict) else ValueError("is no JSON object")
