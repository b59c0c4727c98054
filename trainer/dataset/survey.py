"""Survey of a dataset before a run: decodes every image once, so that all faults are known in advance."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trainer.core.digests import Digests
from trainer.dataset import Dataset, image_facts
from trainer.dataset.buckets import nearest_bucket, upscale_factor
from trainer.dataset.image_facts import ImageFacts, Progress
from trainer.dataset.listing import Listing
from trainer.dataset.sample import Sample
from trainer.dataset.source import Source
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
    samples = limit_samples(listing.samples, settings.limit)
    facts = {} if settings.generated else image_facts.inspect_images(samples, progress)
    digests.flush()
    usable = []
    for sample in samples:
        faults = _find_faults(sample, facts, transform, settings.max_upscale)
        listing.faults += faults
        if not faults:
            usable.append(sample)
    listing.samples, listing.facts = usable, facts
    return listing


def _find_faults(
    sample: Sample, facts: dict[Source, ImageFacts], transform: Transform, max_upscale: float | None
) -> list[str]:
    faults = [
        f"{source.name}: {facts[source].fault}"
        for source in image_facts.sample_sources(sample)
        if source in facts and facts[source].fault
    ]
    if faults or max_upscale is None:
        return faults
    width, height = sample.image.size()
    factor = upscale_factor((width, height), nearest_bucket((width, height), transform.sizes))
    if factor <= max_upscale:
        return []
    return [
        f"{sample.image.name}: {width} x {height} pixels would be enlarged {factor:.1f} times (dataset.max_upscale)"
    ]
