"""The layout captions_json: captions.json, file name -> caption, beside the images/ that holds the pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core.errors import DataError
from trainer.core.files import Digests, storage
from trainer.dataset.picture import SUFFIXES
from trainer.dataset.reading import Listing, Reading, by_name, sides
from trainer.dataset.table import Row, collect, unique

if TYPE_CHECKING:
    from trainer.dataset import CaptionsJson

TABLE = "captions.json"


def read(settings: CaptionsJson, digests: Digests) -> Listing:
    """One sample an entry; FOLDER itself, or FOLDER/train and FOLDER/validation (or val/, test/).

    In place of a caption an entry may be an object with `dataset.caption_column` and others; in place of the whole a list of such objects.
    Raises errors.DataError where there is no table, or none that can be read.
    """
    reading = Reading(settings.folder(), digests)
    parts = sides(reading, lambda folder: (folder / TABLE).is_file())
    if not parts:
        raise DataError(
            f'dataset.path={settings.path}: there is no {TABLE} in it, with {{"NAME.jpg": "what it shows", ...}} for the pictures in images/.'
        )
    for folder, split in parts:
        collect(reading, settings, _rows(settings, folder / TABLE), folder, split)
        _strays(reading, folder)
    return reading.listing()


def _rows(settings: CaptionsJson, table: Path) -> Iterator[tuple[str, Row | ValueError]]:
    with storage("read", table):
        data = table.read_bytes()
    try:
        entries = json.loads(data.removeprefix(b"\xef\xbb\xbf"), object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{table} is not the JSON file it claims to be: {error}. Mend it.") from None
    if not isinstance(entries, list):
        raise DataError(f"{table} holds neither an object (file name -> caption) nor a list of objects. Mend it.")
    for number, entry in enumerate(entries, 1):
        # An object came as its (name, value) pairs, so that a name that stands twice is not lost.
        if isinstance(entry, tuple):
            name, value = entry
            place = f"{TABLE} {name!r:.80}"
            given: list = [(settings.image_column, name)]
        else:
            place, value, given = f"{TABLE} entry {number}", entry, []
            if not _is_object(entry):
                yield place, ValueError("is no JSON object")
                continue
        own = value if _is_object(value) else [(settings.caption_column, value)]
        try:
            yield place, unique([*given, *own])
        except ValueError as error:
            yield place, error


def _is_object(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(item, tuple) for item in value)


def _strays(reading: Reading, folder: Path) -> None:
    """Say which pictures have no caption: they are not trained on."""
    if not (folder / "images").is_dir():
        return
    used = {sample.image.name for sample in reading.samples}
    there = [path for paths in by_name(reading, folder / "images", SUFFIXES, str).values() for path in paths]
    unused = [path.name for path in there if str(path) not in used]
    if unused and not reading.faults:
        reading.notes.append(
            f"{len(unused)} pictures of {reading.name(folder / 'images')}/ have no entry in {TABLE} ({', '.join(unused[:3])} ...)"
        )
