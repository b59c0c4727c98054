"""The layout imagefolder: metadata.jsonl, one JSON object a line, beside its pictures or beside the images/ that holds them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.dataset.picture import FileSource
from trainer.dataset.sample import Sample, caption, clashes, identify, inside, refuse, relative
from trainer.errors import BadData
from trainer.files import Digests, storage

if TYPE_CHECKING:
    from trainer.dataset import ImageFolder

TABLE = "metadata.jsonl"


def read(settings: ImageFolder, digests: Digests) -> list[Sample]:
    """One sample a line. Raises one errors.BadData that lists every fault by its line."""
    folder = settings.folder()
    table = folder / TABLE
    if not table.is_file():
        raise BadData(f"dataset.path={settings.path}: there is no {TABLE} in it, with a line like {_example(settings)} for each picture.")
    with storage("read", table):
        lines = table.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")

    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    samples, places, faults = [], [], []
    for number, line in rows:
        place = f"{TABLE} line {number}"
        try:
            row = json.loads(line.decode(), object_pairs_hook=_columns)
        except (ValueError, RecursionError) as error:
            faults.append(f"{place}: {error}")
            continue
        if not isinstance(row, dict):
            faults.append(f"{place}: is no JSON object like {_example(settings)}")
            continue
        image, text = None, None
        try:
            path = _find(folder, _cell(row, settings.image_column, "image_column"))
            image = FileSource(path, digests)
            places.append((identify(path.relative_to(folder)), f"{place} ({path.relative_to(folder)})"))
            image.size()
        except (ValueError, BadData) as error:
            image = None
            faults.append(f"{place}: {error}")
        try:
            text = caption(_cell(row, settings.caption_column, "caption_column"))
        except ValueError as error:
            faults.append(f"{place}: {error}")
        if image and text:
            samples.append(Sample(places[-1][0], image, text))
    faults += clashes(places)
    refuse(faults, f"dataset.path={settings.path}", len(rows))
    return samples


def _columns(pairs: list[tuple[str, object]]) -> dict[str, object]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        raise ValueError("has the same column twice")
    return columns


def _cell(row: dict[str, object], column: str, key: str) -> object:
    if column not in row:
        names = ", ".join(row) or "none"
        raise ValueError(f"has no column {column!r} (its columns: {names}); type dataset.{key}=NAME")
    return row[column]


def _find(folder: Path, name: object) -> Path:
    """The file a row names, or ValueError with the reason why not; a file outside the folder is not even looked at."""
    path = relative(name)
    for candidate in (folder / path, folder / "images" / path):
        if not inside(folder, candidate):
            raise ValueError(f"{str(path)!r} is a link out of the data set's folder; put the file itself there")
        if os.path.isfile(candidate):
            return candidate
    raise ValueError(f"there is no file {str(path)!r}, here or in images/")


def _example(settings: ImageFolder) -> str:
    return json.dumps({settings.image_column: "NAME.jpg", settings.caption_column: "what it shows"})
