"""Survey of a dataset before a run: decodes every image once, so that all faults are known in advance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

from trainer.core.digests import Digests
from trainer.core.errors import DataError, UsageError
from trainer.dataset import Dataset, image_facts
from trainer.dataset.buckets import upscale_factor
from trainer.dataset.image_facts import Progress
from trainer.dataset.listing import Listing
from trainer.dataset.one_caption import OneCaption
from trainer.dataset.sample import Sample
from trainer.dataset.splitting import limit_samples
from trainer.dataset.transform import Transform


def survey_dataset(
    settings: Dataset, digests: Digests, transform: Transform, progress: Progress, ignored: Iterable[Path] = ()
) -> Listing:
    """Reads a dataset and decodes its images. Returns the usable samples, sorted by id and limited, and all faults.

    `ignored`: see `Dataset.read`.

    Raises errors.UsageError if the path is missing, errors.DataError if the folder does not have this layout.
    """
    listing = settings.read(digests, ignored)
    regularization = _read_regularization(settings, digests, ignored)
    samples, more = (limit_samples(found.samples, settings.limit) for found in (listing, regularization))
    facts = image_facts.inspect_images([*(() if settings.generated else samples), *more], progress)
    digests.flush()
    listing.faults += regularization.faults
    listing.notes += regularization.notes
    listing.unused += regularization.unused
    listing.found += regularization.found
    listing.facts = facts
    listing.samples = [sample for sample in samples if not _add_faults(sample, transform, listing)]
    listing.regularization = [sample for sample in more if not _add_faults(sample, transform, listing)]
    return listing


def _read_regularization(settings: Dataset, digests: Digests, ignored: Iterable[Path]) -> Listing:
    """Returns the samples of `dataset.regularization` for training, with its weight, and their faults."""
    regularization = settings.regularization
    if regularization.path is None:
        return Listing([])
    folders = [Path(path).expanduser().resolve() for path in (regularization.path, settings.path) if path]
    if any(folder == other or other in folder.parents for folder, other in permutations(folders, 2)):
        raise UsageError(
            f"dataset.regularization.path={regularization.path} and dataset.path={settings.path}: one of these folders "
            "contains the other, so that images could be both held out and trained on; move the regularization images "
            "into a folder of their own."
        )
    try:
        if regularization.caption is not None:
            dataset: Dataset = OneCaption(path=regularization.path, caption=regularization.caption)
        else:
            dataset = settings.for_regularization()
        listing = dataset.read(digests, ignored)
        if not listing.samples and not listing.faults:
            raise DataError(f"dataset.path={regularization.path}: there is no image in it.")
    except (DataError, UsageError) as error:
        # A layout names the setting of its own folder.
        raise type(error)(str(error).replace("dataset.path=", "dataset.regularization.path=")) from None
    samples = [
        replace(sample, id=f"regularization/{sample.id}", weight=sample.weight * regularization.weight)
        for sample in listing.samples
        if sample.split in (None, "train")
    ]
    faults, notes, unused = (
        [f"regularization: {text}" for text in texts] for texts in (listing.faults, listing.notes, listing.unused)
    )
    return Listing(samples, faults, notes, listing.found, unused=unused)


def _add_faults(sample: Sample, transform: Transform, listing: Listing) -> bool:
    """Adds the faults of a sample to the listing, which has the facts. Returns whether it has any."""
    facts = listing.facts
    faults = [
        f"{source.name}: {facts[source].fault}"
        for source in image_facts.sample_sources(sample)
        if source in facts and facts[source].fault
    ]
    if not faults and not transform.resolutions_of(sample.image):
        width, height = sample.image.size()
        factor = upscale_factor((width, height), transform.resolutions[0].size_of((width, height)))
        faults = [
            f"{sample.image.name}: {width} x {height} pixels would be enlarged {factor:.1f} times (dataset.max_upscale)"
        ]
    listing.faults += faults
    return bool(faults)
