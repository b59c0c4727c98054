"""Layout `imagefolder`: metadata.jsonl, one JSON object per line, beside its images or their images/."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.core.files import storage_errors
from trainer.dataset.collector import SampleCollector
from trainer.dataset.listing import Listing
from trainer.dataset.splitting import find_split_folders
from trainer.dataset.table import Row, Table, collect_rows, to_row

TABLE = "metadata.jsonl"


@dataclass(slots=True)
class ImageFolder(Table):
    """Images, and a metadata.jsonl with their captions."""

    def read(self, digests: Digests) -> Listing:
        """Reads one sample per line, see `Dataset.read`; from FOLDER, or FOLDER/train and FOLDER/validation."""
        collector = SampleCollector(self.require_folder(), digests)
        parts = find_split_folders(collector, lambda folder: (folder / TABLE).is_file())
        if not parts:
            example = json.dumps({self.image_column: "NAME.jpg", self.caption_column: "what it shows"})
            raise DataError(
                f"dataset.path={self.path}: there is no {TABLE} in it, with a line like {example} for each image."
            )
        for folder, split in parts:
            collect_rows(collector, self, _read_rows(folder / TABLE, collector), folder, split)
        return collector.to_listing()


def _read_rows(table: Path, collector: SampleCollector) -> Iterator[tuple[str, Row | ValueError]]:
    with storage_errors("read", table):
        data = table.read_bytes()
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        location = f"{collector.relative_name(table)} line {number}"
        try:
            row = json.loads(line.decode(), object_pairs_hook=to_row)
        except (ValueError, RecursionError) as error:
            yield location, ValueError(error)
            continue
        yield location, row if isinstance(row, dict) else ValueError("is not a JSON object")
