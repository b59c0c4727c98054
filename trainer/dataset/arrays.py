"""Layout `arrays`: images and descriptions in NumPy files.

train_images.npy (N, H, W, 3) uint8 and train_descriptions.npy (N,), and the same with test_ for validation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.core.digests import Digests
from trainer.core.errors import DataError
from trainer.dataset import Dataset
from trainer.dataset.collector import SampleCollector
from trainer.dataset.listing import Listing
from trainer.dataset.paths import LINK_OUTSIDE, is_inside
from trainer.dataset.sample import Sample
from trainer.dataset.splitting import VALIDATION_NAMES, assign_splits

IMAGES, DESCRIPTIONS = "images", "descriptions"


@dataclass(slots=True)
class Arrays(Dataset):
    """Images and descriptions as NumPy arrays, which stay on the disk."""

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Reads one sample per entry; see `Dataset.read`.

        A test_ (or validation_, val_) array is held out, if there is one.
        """
        collector = SampleCollector(self.require_folder(), digests, ignored)
        names = [name for name in ("train", *VALIDATION_NAMES) if (collector.root / f"{name}_{IMAGES}.npy").exists()]
        if "train" not in names:
            raise DataError(
                f"dataset.path={self.path}: there is no train_{IMAGES}.npy in it, uint8 (N, H, W, 3), "
                f"with train_{DESCRIPTIONS}.npy (N,)."
            )
        for name, split in assign_splits(collector, names).items():
            _collect_part(collector, name, split)
        return collector.to_listing()


def _collect_part(collector: SampleCollector, name: str, split: str | None) -> None:
    from trainer.dataset import array_files

    paths = [collector.root / f"{name}_{part}.npy" for part in (IMAGES, DESCRIPTIONS)]
    collector.mark_used(*paths)
    for path in paths:
        if not is_inside(collector.root, path):
            raise DataError(f"{path}: {LINK_OUTSIDE}")
    sources = array_files.image_sources(paths[0], collector.digests)
    descriptions = array_files.open_descriptions(paths[1])
    if len(sources) != len(descriptions):
        raise DataError(
            f"{paths[0].name} has {len(sources)} images and {paths[1].name} {len(descriptions)} descriptions; "
            "each image needs one"
        )
    for index, source in enumerate(sources):
        collector.found += 1
        location = f"{paths[1].name}[{index}]"
        caption = collector.attempt(location, array_files.read_description, descriptions, index)
        if caption is not None:
            collector.add(Sample(f"{name}-{index:08d}", source, caption, split=split), name)
