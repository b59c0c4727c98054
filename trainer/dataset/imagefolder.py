"""Layout `imagefolder`: images with a caption file beside each, or a metadata.jsonl, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.dataset.captioned_folder import TABLE, CaptionedFolder, find_captioned_folders
from trainer.dataset.collector import SampleCollector
from trainer.dataset.listing import Listing
from trainer.dataset.splitting import find_split_folders
from trainer.dataset.table import Table, collect_rows, read_json_lines


@dataclass(slots=True)
class ImageFolder(Table):
    """Images, with a caption file beside each, or a metadata.jsonl with all captions.

    The columns are those of metadata.jsonl.
    """

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Reads one sample per line of metadata.jsonl or per image, see `Dataset.read`; from FOLDER, or FOLDER/train
        and FOLDER/validation.
        """
        collector = SampleCollector(self.require_folder(), digests, ignored)
        tables = find_split_folders(collector, lambda folder: (folder / TABLE).is_file())
        for folder, split in tables:
            collector.caption_table = TABLE
            collector.mark_used(folder / TABLE)
            collect_rows(collector, self, read_json_lines(folder / TABLE, collector), folder, split)
        if not tables:
            self._collect_captioned(collector)
        return collector.to_listing()

    def _collect_captioned(self, collector: SampleCollector) -> None:
        example = json.dumps({self.image_column: "NAME.jpg", self.caption_column: "what it shows"})
        missing = f"dataset.path={self.path}: there is no {TABLE} in it, with a line like {example} for each image"
        columns = (self.image_column, self.caption_column, self.control_columns, self.mask_column)
        if columns != ("file_name", "text", [], None):
            raise DataError(f"{missing}. The columns in your settings belong to it; leave them out to read NAME.txt.")
        parts = find_captioned_folders(collector)
        if not parts:
            raise DataError(
                f"{missing}, and no image with a caption file beside it: NAME.jpg and NAME.txt. "
                "For images in .tar archives type dataset=webdataset."
            )
        for folder, split in parts:
            CaptionedFolder(collector, folder).collect(split)
