"""Layout `captions_json`: captions.json maps file names to captions, images/ contains the images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core import documents
from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.core.files import storage_errors
from trainer.dataset.collector import SampleCollector
from trainer.dataset.listing import Listing
from trainer.dataset.splitting import find_split_folders
from trainer.dataset.table import Row, Table, collect_rows, to_row

TABLE = "captions.json"


@dataclass(slots=True)
class CaptionsJson(Table):
    """Images in images/, and a captions.json with their captions."""

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Reads one sample per entry, see `Dataset.read`; from FOLDER, or FOLDER/train and FOLDER/validation.

        Instead of a caption, an entry may be an object with the caption and other columns. Instead of one object with
        all entries, the file may contain a list of such objects.
        """
        collector = SampleCollector(self.require_folder(), digests, ignored)
        parts = find_split_folders(collector, lambda folder: (folder / TABLE).is_file())
        if not parts:
            raise DataError(
                f"dataset.path={self.path}: there is no {TABLE} in it, "
                'with {"NAME.jpg": "what it shows", ...} for the images in images/.'
            )
        collector.caption_table = TABLE
        for folder, split in parts:
            collector.mark_used(folder / TABLE)
            collect_rows(collector, self, _read_rows(self, folder / TABLE), folder, split)
        return collector.to_listing()


def _read_rows(settings: CaptionsJson, table: Path) -> Iterator[tuple[str, Row | ValueError]]:
    with storage_errors("read", table):
        data = table.read_bytes()
    try:
        # An object becomes a list of (name, value) tuples, so that a name that occurs twice is not lost.
        entries = documents.parse_json(data, list)
    except ValueError as error:
        raise DataError(f"{table} is not the JSON file it claims to be: {error}. Fix the file.") from None
    if not isinstance(entries, list):
        raise DataError(
            f"{table} contains neither an object (file name -> caption) nor a list of objects. Fix the file."
        )
    for number, entry in enumerate(entries, 1):
        columns: list[tuple[str, Any]] = []
        if isinstance(entry, tuple):
            name, value = entry
            location = f"{TABLE} {name!r:.80}"
            columns.append((settings.image_column, name))
        else:
            value, location = entry, f"{TABLE} entry {number}"
            if not _is_object(entry):
                yield location, ValueError("is not a JSON object")
                continue
        columns += value if _is_object(value) else [(settings.caption_column, value)]
        try:
            yield location, to_row(columns)
        except ValueError as error:
            yield location, error


def _is_object(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(item, tuple) for item in value)
