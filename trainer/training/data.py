"""What a run works on before any weight of the denoiser is loaded: samples, and the cache of what the encoders make of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from trainer.cache.store import Cache
from trainer.config.schema import Run
from trainer.config.sections import Stage
from trainer.core.console import refresh_interval
from trainer.core.digests import Digests
from trainer.core.errors import DataError, UsageError
from trainer.dataset import splitting
from trainer.dataset.listing import Listing
from trainer.dataset.sample import Sample
from trainer.dataset.source import Source
from trainer.dataset.splitting import Split
from trainer.dataset.survey import survey_dataset
from trainer.dataset.transform import Transform, TransformedSample, build_transform
from trainer.model import Recipe

MASK = "mask"


@dataclass(slots=True)
class TrainingData:
    split: Split
    transform: Transform
    cache: Cache
    digests: dict[str, Any]
    """Of the data set, and of each component of the model."""
    listing: Listing
    """What was found when the data set was read: faults, and facts of its pictures."""

    @property
    def visited(self) -> list[Sample]:
        """The samples to train on as an epoch visits them: some several times."""
        return [sample for sample in self.split.train for _ in range(sample.repeats)]

    @property
    def weighted(self) -> bool:
        """Whether some samples, or parts of their pictures, count more than others."""
        return any(sample.mask or sample.weight != 1 for sample in self.split.train)

    @property
    def controls(self) -> int:
        """Control pictures a sample."""
        return len(self.split.train[0].controls)


def prepare(run: Run) -> TrainingData:
    """Read the data set, looking at every picture once, and digest all that the run depends on.

    Raises errors.DataError that lists the faults; for stage=check only where nothing is left without them.
    """
    root = Path(run.cache.path) if run.cache.path else Path(run.out) / "cache"
    digests = Digests(root / "digests.sqlite", verify=run.cache.verify == "full")
    transform = build_transform(run.dataset, run.model.size_multiple)
    listing = survey_dataset(run.dataset, digests, transform, _progress)
    where = run.dataset.describe()
    if not listing.samples or (run.dataset.on_fault == "stop" and run.stage is not Stage.check):
        listing.raise_on_faults(where)
    try:
        split = splitting.split_samples(listing.samples, run.dataset.validation_fraction, dataset_name=where)
    except DataError as error:
        # What is left out may be why too little is left.
        if listing.faults:
            raise DataError(f"{error}\n{listing.count_faults(where)}:\n{listing.format_faults()}") from None
        raise
    controls = len(split.train[0].controls)
    if controls not in run.model.control_counts:
        least, most = min(run.model.control_counts), max(run.model.control_counts)
        takes = str(most or "none") if least == most else f"{least} to {most}"
        raise UsageError(
            f"{where} has {controls} control pictures a sample, and this model takes {takes}; type another dataset or another model"
        )
    weights = run.model.component_digests(digests)
    content = [
        (
            sample.id,
            side,
            sample.caption,
            sample.image.digest(),
            [control.digest() for control in sample.controls],
            *_extras(sample),
        )
        for side, samples in (("train", split.train), ("validation", split.validation))
        for sample in samples
    ]
    digests.flush()
    recipes = run.model.recipes(weights, controls)
    if any(sample.mask for sample in split.train):
        recipes |= {MASK: Recipe((MASK,), f"area means over {pixels_a_latent(run)} pixels")}
    data = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return TrainingData(
        split, transform, Cache(root, recipes, verify=run.cache.verify), {"data": data, "weights": weights}, listing
    )


def _progress(sources: Sequence[Source]) -> Iterable[Source]:
    """With a bar, where it takes long."""
    from tqdm import tqdm

    return tqdm(sources, desc="looking at pictures", unit="picture", mininterval=refresh_interval(), delay=1)


def _extras(sample: Sample) -> list:
    """What only some samples have and counts in training."""
    extras = [sample.mask and sample.mask.digest(), sample.weight, sample.repeats]
    return extras if extras != [None, 1.0, 1] else []


def pixels_a_latent(run: Run) -> int:
    """Sides of a picture over those of its latents."""
    width, height = run.dataset.size()
    return height // run.model.shapes(height, width)["latents"][1]


def held_out(run: Run, material: TrainingData, count: int) -> list[TransformedSample]:
    """Validation samples to judge by: the first by the hash of their ids, so that a set that grows keeps most of them."""
    by_hash = sorted(material.split.validation, key=lambda sample: hashlib.sha256(sample.id.encode()).digest())
    return [material.transform.apply(sample) for sample in by_hash[:count]]


def drawn(run: Run, material: TrainingData) -> list[tuple[TransformedSample, bool]]:
    """What is drawn at each evaluation, and whether it can be compared with a target: held-out samples, or the prompts that were asked for.

    A prompt borrows the control pictures of a held-out sample. Without held-out samples those to train on stand in.
    """
    settings = run.evaluation
    views = held_out(run, material, len(settings.prompts or ()) or settings.images)
    views = views or [material.transform.apply(sample) for sample in material.split.train[: settings.images]]
    if settings.prompts is None:
        return [(view, True) for view in views for _ in range(settings.images_per_prompt)]
    return [
        (replace(views[i % len(views)], sample=replace(views[i % len(views)].sample, caption=prompt)), False)
        for i, prompt in enumerate(settings.prompts)
        for _ in range(settings.images_per_prompt)
    ]


def views(run: Run, material: TrainingData) -> list[TransformedSample]:
    """Every view that training and evaluation can ask the cache for."""
    settings = run.dataset
    asked = (settings.flip, settings.caption_dropout, settings.control_dropout)
    ways = list(product(*((False, True) if wanted else (False,) for wanted in asked)))
    training = [material.transform.apply(sample, *way) for sample in material.split.train for way in ways]
    to_draw = [view for view, _ in drawn(run, material)]
    return training + held_out(run, material, run.evaluation.samples) + to_draw + unconditional(run, to_draw)


def unconditional(run: Run, views: list[TransformedSample]) -> list[TransformedSample]:
    """The views that drawing these needs beside them for classifier-free guidance: the same without captions, where the model asks for it."""
    asked = run.model.classifier_free_guidance and run.sample.guidance != 1
    return [replace(view, drop_caption=True) for view in views] if asked else []
