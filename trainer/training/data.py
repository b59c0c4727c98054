"""Training data: the samples of a run, and the cache of what the encoders compute from them."""

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
from trainer.core.batch import RESERVED
from trainer.core.digests import Digests
from trainer.core.errors import DataError, UsageError
from trainer.dataset.listing import Listing, plural
from trainer.dataset.source import Source
from trainer.dataset.splitting import Split, split_samples
from trainer.dataset.survey import survey_dataset
from trainer.dataset.tags import shuffled_captions
from trainer.dataset.transform import Transform, TransformedSample, build_transform
from trainer.model import Family, Recipe
from trainer.training.visits import Visits

MASK = "mask"
"""Name of the cached tensor with the edit mask."""


@dataclass(slots=True)
class TrainingData:
    """What a run trains on and is evaluated with."""

    split: Split
    transform: Transform
    visits: Visits
    cache: Cache
    digests: dict[str, Any]
    """Digests of the dataset (`data`) and of each component of the model (`weights`)."""
    listing: Listing
    """Faults and facts about the images, found when the dataset was read."""

    @property
    def control_count(self) -> int:
        """Number of control images of each sample."""
        return len(self.split.train[0].controls)

    def total_steps(self, run: Run) -> int:
        """Returns the number of steps of the run: `steps`, or those that `epochs` of the training samples take."""
        if run.steps:
            return run.steps
        assert run.epochs is not None
        return self.visits.steps_for(run.epochs * len(self.visits.training))


def prepare(run: Run, has_weights: bool = True) -> TrainingData:
    """Reads the dataset, decodes every image once, and computes the digests of everything that the run depends on.

    Without weights, no entry of the cache is found.

    Raises errors.DataError with the list of faults; for `stage=check` only if every sample has a fault.
    """
    root = Path(run.cache.path) if run.cache.path else Path(run.out) / "cache"
    digests = Digests(root / "digests.sqlite", verify=run.cache.verify == "full")
    transform = build_transform(run.dataset, run.model.size_multiple)
    listing = survey_dataset(run.dataset, digests, transform, _progress, ignored=(Path(run.out), root))
    name = run.dataset.describe()
    if not listing.samples or (run.dataset.on_fault == "stop" and run.stage is not Stage.check):
        listing.raise_on_faults(name)
    split = _split(run, listing)
    _check_samples(run, split)
    run.model.check_configs()
    for width, height in transform.sizes:
        run.model.objective.check_latents(*run.model.shapes(height, width)["latents"][-2:])
    weights = run.model.component_digests(digests) if has_weights else dict.fromkeys(run.model.components, "absent")
    data = _digest(split)
    digests.flush()
    recipes = run.model.recipes(weights, len(split.train[0].controls))
    check_names(run.model, recipes)
    if any(sample.mask for sample in split.trained):
        recipes |= {MASK: Recipe((MASK,), f"area means over {pixels_per_latent(run)} pixels")}
    cache = Cache(root, recipes, verify=run.cache.verify)
    assert run.batch is not None
    epochs = [
        [sample for sample in samples for _ in range(sample.repeats)] for samples in (split.train, split.regularization)
    ]
    visits = Visits(run.seed, run.batch, run.dataset, transform, *epochs)
    return TrainingData(split, transform, visits, cache, {"data": data, "weights": weights}, listing)


def _check_samples(run: Run, split: Split) -> None:
    """Checks that the samples have the control images and texts that the model reads. Raises errors.UsageError."""
    name, controls = run.dataset.describe(), len(split.train[0].controls)
    if controls not in run.model.control_counts:
        fewest, most = min(run.model.control_counts), max(run.model.control_counts)
        accepted = str(most or "none") if fewest == most else f"{fewest} to {most}"
        raise UsageError(
            f"{name} has {controls} control images per sample, but this model takes {accepted}; "
            "type a different dataset or a different model"
        )
    for sample in split.regularization:
        missing = [text for text in run.model.text_fields if text not in dict(sample.texts)]
        if len(sample.controls) != controls or missing:
            other = f"no {missing[0]}" if missing else plural(len(sample.controls), "control image")
            raise UsageError(
                f"dataset.regularization: {sample.image.name} has {other}, but the samples of {name} have "
                f"{missing[0] if missing else controls}; give it the same layout as the dataset, without "
                "dataset.regularization.caption"
            )


def check_names(family: Family, names: Iterable[str]) -> None:
    """Raises errors.UsageError if a model family caches tensors under names that training uses."""
    reserved = sorted(RESERVED & set(names))
    if reserved:
        kind = type(family)
        raise UsageError(
            f"{kind.__module__}: {kind.__name__}.recipes names a cached tensor {reserved[0]}, and training adds one "
            f"of this name to each batch; call it for example prompt_{reserved[0]}"
        )


def _progress(sources: Sequence[Source]) -> Iterable[Source]:
    from trainer.core.bars import ProgressBar

    return ProgressBar(sources, desc="reading images", unit="image", delay=1)


def _split(run: Run, listing: Listing) -> Split:
    name = run.dataset.describe()
    try:
        split = split_samples(listing.samples, run.dataset.validation_fraction, dataset_name=name)
        split.regularization = listing.regularization
        if run.dataset.regularization.path is not None and not split.regularization:
            raise DataError(f"dataset.regularization.path={run.dataset.regularization.path}: no image is for training.")
        return split
    except DataError as error:
        # The faulty samples may be the reason why too few are left.
        if listing.faults:
            raise DataError(f"{error}\n{listing.count_faults(name)}:\n{listing.format_faults()}") from None
        raise


def _digest(split: Split) -> str:
    """Returns a hash of the content of all samples and of the part of the split that each belongs to."""
    content = []
    sides = {"train": split.train, "validation": split.validation, "regularization": split.regularization}
    for side, samples in sides.items():
        for sample in samples:
            controls = [control.digest() for control in sample.controls]
            values: list[Any] = [sample.id, side, sample.caption, sample.image.digest(), controls]
            extras = [sample.mask and sample.mask.digest(), sample.weight, sample.repeats]
            # Left out if they have their default values, so that older datasets keep their digests.
            if extras != [None, 1.0, 1]:
                values += extras
            if sample.texts:
                values.append(dict(sample.texts))
            content.append(values)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def pixels_per_latent(run: Run) -> int:
    """Returns the side length of images in pixels, divided by that of their latents."""
    size = run.dataset.size()
    assert size is not None
    width, height = size
    return height // run.model.shapes(height, width)["latents"][1]


def held_out_samples(data: TrainingData, count: int) -> list[TransformedSample]:
    """Returns the first validation samples in the order of the hashes of their ids.

    If the dataset grows, most of these samples stay the same.
    """
    by_hash = sorted(data.split.validation, key=lambda sample: hashlib.sha256(sample.id.encode()).digest())
    return [data.transform.apply(sample) for sample in by_hash[:count]]


def samples_to_generate(run: Run, data: TrainingData) -> list[tuple[TransformedSample, bool]]:
    """Returns the samples for which each evaluation generates an image, and whether the image has a target.

    These are held-out samples, or the prompts of `evaluation.prompts` with the control images of held-out samples. If
    no samples are held out, training samples take their place.
    """
    settings = run.evaluation
    assert settings.images is not None
    samples = held_out_samples(data, len(settings.prompts or ()) or settings.images)
    samples = samples or [data.transform.apply(sample) for sample in data.split.train[: settings.images]]
    if settings.prompts is None:
        return [(sample, True) for sample in samples for _ in range(settings.images_per_prompt)]
    prompted = []
    for i, prompt in enumerate(settings.prompts):
        sample = samples[i % len(samples)]
        sample = replace(sample, sample=replace(sample.sample, caption=prompt))
        prompted += [(sample, False)] * settings.images_per_prompt
    return prompted


def required_samples(run: Run, data: TrainingData) -> list[TransformedSample]:
    """Returns all transformed samples that training and evaluation can request from the cache."""
    settings = run.dataset
    options = (settings.flip, settings.caption_dropout, settings.control_dropout)
    variants = list(product(*((False, True) if option else (False,) for option in options)))
    training = [
        data.transform.apply(
            sample,
            resolution,
            flip=flip,
            drop_caption=drop_caption,
            drop_control=drop_control,
            shuffled_caption=caption,
        )
        for sample, resolution in data.visits.used(data.total_steps(run))
        for caption in dict.fromkeys(shuffled_captions(settings, sample.caption))
        for flip, drop_caption, drop_control in variants
    ]
    generated = [sample for sample, _ in samples_to_generate(run, data)]
    held_out = held_out_samples(data, run.evaluation.samples)
    return training + held_out + generated + unconditional_samples(run, generated)


def unconditional_samples(run: Run, samples: list[TransformedSample]) -> list[TransformedSample]:
    """Returns the samples without captions, for classifier-free guidance; an empty list if it is not used."""
    assert run.sample.guidance is not None
    needed = run.model.classifier_free_guidance and run.sample.guidance > 1
    return [replace(sample, drop_caption=True) for sample in samples] if needed else []
