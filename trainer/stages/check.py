"""What stage=check says of the data: counts, sizes, captions, what is there twice, what is wrong, and a sheet of samples to look at."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from trainer.config.identity import run_id
from trainer.config.schema import Run
from trainer.core import files
from trainer.core.console import print_line
from trainer.dataset import image_facts
from trainer.dataset.buckets import upscale_factor
from trainer.dataset.sample import Sample
from trainer.training.data import TrainingData

SHOWN = 3
"""Examples of each finding."""
ON_SHEET = 24
"""Samples on the contact sheet."""


def data(run: Run, material: TrainingData) -> None:
    """Print the report, and write the contact sheet and the list of faults beside the runs. Raises errors.DataError where there are faults."""
    folder = Path(run.out) / "check" / run_id(run)
    split, listing = material.split, material.listing
    samples = [*split.train, *split.validation]
    visited = len(material.visited)
    often = f" ({visited} visits an epoch)" if visited != len(split.train) else ""
    print_line(
        f"data        {len(split.train)} to train on{often}, {len(split.validation)} held out, {material.controls} control picture(s) each"
    )
    if split.test:
        print_line(f"            {len(split.test)} kept for the end (stage=sample sample.split=test)")
    for line in (*_sizes(material, samples), *_captions(run, samples), *_twice(material, samples), *listing.notes):
        print_line(f"            {line}")
    print_line(f"sheet       {_sheet(folder / 'samples.png', material, samples)}")
    where = run.dataset.describe()
    if listing.faults:
        files.write(folder / "faults.txt", listing.format_faults() + "\n")
        print_line(f"faults      {listing.count_faults(where)}, listed in {folder / 'faults.txt'}")
    if run.dataset.on_fault == "stop":
        listing.raise_on_faults(where, max_shown=None)
    elif listing.faults:
        print_line(f"left out, for dataset.on_fault=skip:\n{listing.format_faults()}")


def _sizes(material: TrainingData, samples: Sequence[Sample]) -> Iterable[str]:
    own = {sample.id: sample.image.size() for sample in samples}
    views = [material.transform.apply(sample) for sample in samples]
    training = {sample.id for sample in material.split.train}
    counts = Counter(((view.width, view.height), view.sample.id in training) for view in views)
    for size in sorted({size for size, _ in counts}):
        yield f"{size[0]}x{size[1]} px: {counts[size, True]} to train on, {counts[size, False]} held out"
    areas = sorted(own.values(), key=lambda size: size[0] * size[1])
    smallest, largest = (f"{width}x{height}" for width, height in (areas[0], areas[-1]))
    yield f"pictures as they are: {smallest}" + (f" to {largest} px" if smallest != largest else " px")
    yield from enlarged(material, samples)


def enlarged(material: TrainingData, samples: Iterable[Sample]) -> list[str]:
    """A line on how many pictures are enlarged, where some are."""
    factors = {}
    for sample in samples:
        view = material.transform.apply(sample)
        factors[sample.image.name] = upscale_factor(sample.image.size(), (view.width, view.height))
    more = {name: factor for name, factor in factors.items() if factor > 1}
    if not more:
        return []
    worst = max(more, key=more.__getitem__)
    return [
        f"{len(more)} pictures are enlarged, up to {more[worst]:.1f} times ({worst}); dataset.max_upscale=1.5 would refuse the worst"
    ]


def cut(run: Run, samples: Sequence[Sample]) -> list[str]:
    """A line on captions of which the model does not read all, where there are some."""
    counted = run.model.count_caption_tokens([sample.caption for sample in samples])
    if counted is None:
        return []
    counts, most = counted
    long = [sample for sample, count in zip(samples, counts, strict=True) if count > most]
    return (
        [f"longer than the {most} tokens that the model reads, so that the rest is left out: captions of {_some(long)}"]
        if long
        else []
    )


def _captions(run: Run, samples: Sequence[Sample]) -> Iterable[str]:
    texts = [sample.caption for sample in samples]
    lengths = [len(text) for text in texts]
    yield f"captions: {min(lengths)} to {max(lengths)} characters, half of them up to {median(lengths):.0f}"
    counted = run.model.count_caption_tokens(texts)
    if counted is not None:
        counts, most = counted
        yield f"tokens: {min(counts)} to {max(counts)}; the model reads {most}"
        yield from cut(run, samples)
    alike = [group for group in _groups(samples, lambda sample: sample.caption) if len(group) > 1]
    if alike and len(alike) < len(samples):
        words = max(alike, key=len)
        yield f"{sum(map(len, alike))} samples share {len(alike)} caption(s); {len(words)} have {words[0].caption!r:.60}"


def _twice(material: TrainingData, samples: Sequence[Sample]) -> Iterable[str]:
    same = [group for group in _groups(samples, lambda sample: sample.image.digest()) if len(group) > 1]
    if same:
        yield f"the same picture is the target of several samples {len(same)} time(s): {_listed(same)}"
    facts = material.listing.facts
    # One sample a picture: what is the same looks the same.
    single = [group[0] for group in _groups(samples, lambda sample: sample.image.digest())] if facts else []
    near = [[single[i] for i in group] for group in image_facts.find_near_duplicates([facts[sample.image] for sample in single])]
    if near:
        yield f"pictures that look alike, {len(near)} group(s): {_listed(near)}"
    training = {sample.id for sample in material.split.train}
    both = [group for group in (*same, *near) if len({sample.id in training for sample in group}) == 2]
    if both:
        yield f"on both sides of the split, so that the held-out loss is too good, {len(both)} group(s): {_listed(both)}"


def _groups(samples: Iterable[Sample], key) -> list[list[Sample]]:
    groups = defaultdict(list)
    for sample in samples:
        groups[key(sample)].append(sample)
    return list(groups.values())


def _listed(groups: Sequence[Sequence[Sample]]) -> str:
    shown = [
        "{" + ", ".join(sample.id for sample in group[:SHOWN]) + (", ..." if group[SHOWN:] else "") + "}"
        for group in groups[:SHOWN]
    ]
    return " ".join(shown) + (" ..." if groups[SHOWN:] else "")


def _some(samples: Sequence[Sample]) -> str:
    names = ", ".join(sample.id for sample in samples[:SHOWN])
    return f"{len(samples)} ({names}{', ...' if samples[SHOWN:] else ''})"


def _sheet(path: Path, material: TrainingData, samples: Sequence[Sample]) -> Path:
    """Samples as the model sees them, spread over the set."""
    from trainer.dataset import image_grid

    step = max(1, len(samples) // ON_SHEET)
    views = [material.transform.apply(sample) for sample in samples[::step][:ON_SHEET]]
    image_grid.save_png(path, image_grid.contact_sheet([([*view.control_pixels(), view.pixels()], view.caption) for view in views]))
    return path
