"""What a run works on before any weight of the denoiser is loaded: samples, and the cache of what the encoders make of them."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import config, dataset, files
from trainer.cache import Cache, Part, View
from trainer.config import Run
from trainer.dataset import Split
from trainer.errors import BadData, Usage
from trainer.report import refresh

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Material:
    split: Split
    size: tuple[int, int]
    """(width, height) in pixels."""
    cache: Cache
    digests: dict[str, Any]
    """Of the data set, and of each component of the model."""

    @property
    def controls(self) -> int:
        """Control pictures a sample."""
        return len(self.split.train[0].controls)


def prepare(run: Run) -> Material:
    """Read the data set's headers and captions, and digest all that the run depends on."""
    root = Path(run.cache.path) if run.cache.path else Path(run.out) / "cache"
    digests = files.Digests(root / "digests.sqlite", verify=run.cache.verify == "full")
    where = run.dataset.path or "the demo world"
    split = dataset.split(dataset.read(run.dataset, digests), run.dataset.validation_fraction, where=where)
    counts = {len(sample.controls) for sample in (*split.train, *split.validation)}
    if len(counts) > 1:
        raise BadData(f"{where}: some samples have {min(counts)} control pictures and some {max(counts)}; all must have as many")
    size = _size(run)
    weights = run.model.digest(digests)
    content = [
        (sample.id, side, sample.caption, sample.image.digest(), [control.digest() for control in sample.controls])
        for side, samples in (("train", split.train), ("validation", split.validation))
        for sample in samples
    ]
    digests.flush()
    parts = [Part(name, made.fields, made.maker) for name, made in run.model.parts(weights, counts.pop()).items()]
    data = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Material(split, size, Cache(root, parts, verify=run.cache.verify), {"data": data, "weights": weights})


def _size(run: Run) -> tuple[int, int]:
    width, height = run.dataset.size()
    multiple = run.model.multiple
    if width % multiple or height % multiple:
        nearest = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (width, height))
        raise Usage(
            f"dataset.resolution={run.dataset.resolution}: this model takes sides divisible by {multiple}; type dataset.resolution={nearest}"
        )
    return width, height


def held_out(run: Run, material: Material, count: int) -> list[View]:
    """Validation samples to judge by: the first by the hash of their ids, so that a set that grows keeps most of them."""
    by_hash = sorted(material.split.validation, key=lambda sample: hashlib.sha256(sample.id.encode()).digest())
    return [View(sample, *material.size) for sample in by_hash[:count]]


def drawn(run: Run, material: Material) -> list[tuple[View, bool]]:
    """What is drawn at each evaluation, and whether it can be compared with a target: held-out samples, or the prompts that were asked for.

    A prompt borrows the control pictures of a held-out sample. Without held-out samples those to train on stand in.
    """
    settings = run.evaluation
    views = held_out(run, material, len(settings.prompts or ()) or settings.images)
    views = views or [View(sample, *material.size) for sample in material.split.train[: settings.images]]
    if settings.prompts is None:
        return [(view, True) for view in views for _ in range(settings.images_per_prompt)]
    return [
        (replace(views[i % len(views)], sample=replace(views[i % len(views)].sample, caption=prompt)), False)
        for i, prompt in enumerate(settings.prompts)
        for _ in range(settings.images_per_prompt)
    ]


def views(run: Run, material: Material) -> list[View]:
    """Every view that training and evaluation can ask the cache for."""
    flips = (False, True) if run.dataset.flip else (False,)
    drops = (False, True) if run.dataset.caption_dropout else (False,)
    training = [View(sample, *material.size, flip, drop) for sample in material.split.train for flip in flips for drop in drops]
    return training + held_out(run, material, run.evaluation.samples) + [view for view, _ in drawn(run, material)]


def encode(run: Run, material: Material, wanted: list[View]) -> dict[str, int]:
    """Fill the cache with what it lacks; how many entries of each part were made. The encoders are gone when this returns."""
    from tqdm import tqdm

    cache = material.cache
    fields = {part.name: part.fields for part in cache.parts}
    # Loads nothing before it is first used.
    encoder = run.model.encoder(config.open_device(run))

    def make(part: str, view: View) -> torch.Tensor:
        pictures = [view.pixels()] if "image" in fields[part] else []
        pictures += view.control_pixels() if "controls" in fields[part] else []
        return encoder.encode(part, pictures, view.caption)

    missing = cache.missing(wanted)
    # One at a time: a second process would make the same entries, so it waits and finds them there.
    with files.Lock(cache.root / "filling", wait=True) if missing else nullcontext():
        missing = missing and cache.missing(wanted)
        with tqdm(missing, desc="encoding", unit="entry", mininterval=refresh(), disable=not missing) as entries:
            return cache.fill(entries, make)
