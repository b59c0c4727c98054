"""A folder of images that have one caption, and its subfolders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.dataset import Dataset
from trainer.dataset.collector import SampleCollector
from trainer.dataset.image_formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES, describe_unread
from trainer.dataset.listing import Listing
from trainer.dataset.paths import walk
from trainer.dataset.sample import Sample, check_caption


@dataclass(slots=True)
class OneCaption(Dataset):
    """Images with the same caption."""

    caption: str = ""

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Reads one sample per image; see `Dataset.read`."""
        collector = SampleCollector(self.require_folder(), digests, ignored)
        caption = check_caption(self.caption)

        def id_of(path: Path) -> str:
            # With the suffix: here, a.jpg and a.png are two images.
            return path.relative_to(collector.root).as_posix()

        for walked in walk(collector.root, collector.ignored):
            for (path,) in collector.group_files(walked.path, UNREAD_SUFFIXES, id_of).values():
                collector.found += 1
                collector.add_fault(f"{collector.relative_name(path)}: {describe_unread(path)}")
            for id, (path,) in collector.group_files(walked.path, IMAGE_SUFFIXES, id_of).items():
                collector.found += 1
                image = collector.attempt("", collector.image_source, path)
                if image is not None and collector.register_id(id, id):
                    collector.add(Sample(id, image, caption), id)
        if not collector.found:
            raise DataError(f"dataset.path={self.path}: there is no image in it.")
        return collector.to_listing()
