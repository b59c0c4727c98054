"""What `stage=check` reports about the data: counts, sizes, captions, duplicates, faults, and a contact sheet."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from trainer.config.schema import Run
from trainer.core import files
from trainer.core.console import print_line
from trainer.dataset.buckets import upscale_factor
from trainer.dataset.image_facts import find_near_duplicates
from trainer.dataset.listing import plural
from trainer.dataset.sample import Sample
from trainer.dataset.tags import shuffled_captions
from trainer.training.data import TrainingData

MAX_EXAMPLES = 3
"""Samples that are named for each finding."""
SHEET_SAMPLES = 24
"""Samples on the contact sheet."""
MANY_VISITS = 200
"""A run that visits each training sample more often than this is probably too long: a model's default number of steps
is meant for tens to thousands of samples."""
FITTING_VISITS = 100
"""Visits of each sample in a run whose length fits the dataset: the usual length of a LoRA on 10 to 100 images."""


def report_data(run: Run, data: TrainingData, folder: Path) -> None:
    """Prints the report, and writes the contact sheet and the lists of faults and unused files to `folder`.

    Raises errors.DataError if there are faults, unless `dataset.on_fault` is "skip".
    """
    split, listing = data.split, data.listing
    samples = [*split.trained, *split.validation]
    epoch_size = len(data.visits.training)
    repeats = f" ({epoch_size} per epoch with repeats)" if epoch_size != len(split.train) else ""
    print_line(
        f"data        {len(split.train)} for training{repeats}, {len(split.validation)} held out, "
        f"{data.control_count} control image(s) each"
    )
    if split.regularization:
        steps, settings = data.total_steps(run), run.dataset.regularization
        visits = steps * data.visits.batch_size - data.visits.training_count(steps)
        print_line(
            f"            {len(split.regularization)} for regularization, {settings.share:.0%} of each batch: "
            f"{visits / len(split.regularization):.1f} visits each, weight {settings.weight:g}"
        )
    if split.test:
        print_line(f"            {len(split.test)} in the test split (stage=sample sample.split=test)")
    captions = (*_captions(run, samples), *_tags(run, data))
    findings = (_sizes(run, data), captions, _duplicates(data, samples), listing.notes)
    for line in (line for lines in findings for line in lines):
        print_line(f"            {line}")
    print_line(f"sheet       {_write_contact_sheet(folder / 'samples.png', data, samples)}")
    name = run.dataset.describe()
    if listing.unused:
        files.write(folder / "unused.txt", "".join(f"{file}\n" for file in listing.unused))
        print_line(f"unused      {plural(len(listing.unused), 'file')}, listed in {folder / 'unused.txt'}")
    if listing.faults:
        files.write(folder / "faults.txt", listing.format_faults() + "\n")
        print_line(f"faults      {listing.count_faults(name)}, listed in {folder / 'faults.txt'}")
    if run.dataset.on_fault == "stop":
        listing.raise_on_faults(name, max_shown=None)
    elif listing.faults:
        print_line(f"left out because of dataset.on_fault=skip:\n{listing.format_faults()}")


def describe_upscaling(data: TrainingData, samples: Iterable[Sample]) -> list[str]:
    """Returns lines about images that are enlarged, or that `dataset.max_upscale` keeps from some resolutions."""
    several = len(data.transform.resolutions) > 1
    enlarged, restricted = {}, []
    for sample in samples:
        size = sample.image.size()
        resolutions = data.transform.resolutions_of(sample.image)
        name = f"{sample.image.name} at {resolutions[-1].name}" if several else sample.image.name
        factor = upscale_factor(size, resolutions[-1].size_of(size))
        if factor > 1:
            enlarged[name] = factor
        if len(resolutions) < len(data.transform.resolutions):
            restricted.append(sample.image.name)
    lines = []
    if enlarged:
        worst = max(enlarged, key=enlarged.__getitem__)
        effect = "use the worst at smaller resolutions only, or refuse them" if several else "refuse the worst"
        lines.append(
            f"{len(enlarged)} images are enlarged, up to {enlarged[worst]:.1f} times ({worst}); "
            f"dataset.max_upscale=1.5 would {effect}"
        )
    if restricted:
        more = ", ..." if len(restricted) > MAX_EXAMPLES else ""
        lines.append(
            f"{len(restricted)} images are too small for the larger resolutions (dataset.max_upscale): "
            f"{', '.join(restricted[:MAX_EXAMPLES])}{more}"
        )
    return lines


def describe_long_captions(run: Run, samples: Sequence[Sample]) -> list[str]:
    """Returns a line about captions that the model does not read completely, if there are any.

    Each tokenizer has its own line, and so has each of the samples' other texts of which this is true.
    """
    texts = {"captions": [sample.caption for sample in samples]}
    texts |= {
        f"texts of dataset.{name}": [dict(sample.texts)[name] for sample in samples] for name in run.model.text_fields
    }
    lines = []
    for name, values in texts.items():
        for tokenizer, (counts, limit) in _count_tokens(run, values).items():
            too_long = [sample.id for sample, count in zip(samples, counts, strict=True) if count > limit]
            if too_long:
                more = ", ..." if len(too_long) > MAX_EXAMPLES else ""
                lines.append(
                    f"{len(too_long)} {name} are longer than the {limit} tokens that the model reads ({tokenizer}), "
                    f"and are cut off: {', '.join(too_long[:MAX_EXAMPLES])}{more}"
                )
    return lines


def _count_tokens(run: Run, texts: Sequence[str]) -> dict[str, tuple[list[int], int]]:
    """Returns what `Family.count_caption_tokens` does; nothing if the tokenizers are not on this machine."""
    tokenizers = [name for name in run.model.components if name.startswith("tokenizer")]
    if all(run.model.component_folder(name).is_dir() for name in tokenizers):
        return run.model.count_caption_tokens(texts)
    return {}


def describe_many_visits(run: Run, data: TrainingData) -> list[str]:
    """Returns a line about a run that visits each sample more than `MANY_VISITS` times, with a length that fits."""
    assert run.batch is not None
    count, steps = len(data.split.train), data.total_steps(run)
    visits = data.visits.training_count(steps) / count
    if visits <= MANY_VISITS:
        return []
    if run.epochs is not None:
        fitting = f"epochs={max(1, FITTING_VISITS * count // len(data.visits.training))}"
    else:
        # A batch that is larger than the dataset holds copies of its samples.
        batch = min(run.batch, count)
        fitting_steps = replace(data.visits, batch_size=batch).steps_for(FITTING_VISITS * count)
        fitting_steps = max(fitting_steps, run.lr_scheduler.warmup + 1)
        fitting = f"steps={fitting_steps}" + (f" batch={batch}" if batch < run.batch else "")
    return [
        f"{steps:,} steps of {run.batch} visit each of the {plural(count, 'training sample')} {visits:,.0f} times, "
        f"which takes a long time and probably overfits; {fitting} would visit each about {FITTING_VISITS} times"
    ]


def _sizes(run: Run, data: TrainingData) -> Iterator[str]:
    split = data.split
    samples = [*split.trained, *split.validation]
    groups = {"for training": split.train, "for regularization": split.regularization, "held out": split.validation}
    if len(data.transform.resolutions) > 1:
        yield from _resolutions(run, data)
        groups = {"held out": split.validation}
    counts = {name: Counter(map(data.transform.size_of, group)) for name, group in groups.items()}
    for size in sorted({size for counter in counts.values() for size in counter}):
        parts = [f"{counter[size]} {name}" for name, counter in counts.items() if groups[name] or name == "held out"]
        yield f"{size[0]}x{size[1]} px: {', '.join(parts)}"
    original_sizes = sorted((sample.image.size() for sample in samples), key=lambda size: size[0] * size[1])
    smallest, largest = (f"{width}x{height}" for width, height in (original_sizes[0], original_sizes[-1]))
    yield f"original sizes: {smallest}" + (f" to {largest} px" if smallest != largest else " px")
    if masked := sum(sample.mask is not None for sample in samples):
        yield f"edit masks: {masked} of {len(samples)} samples have one"
    yield from describe_upscaling(data, samples)


def _resolutions(run: Run, data: TrainingData) -> Iterator[str]:
    """Yields for each resolution how many samples visit it how often, and at which sizes."""
    steps = data.total_steps(run)
    counts = data.visits.counts(steps)
    for resolution in data.transform.resolutions:
        visits = {sample: count for (sample, visited), count in counts.items() if visited == resolution}
        sizes = Counter(data.transform.size_of(sample, resolution) for sample in visits)
        listed = ", ".join(f"{count} at {width}x{height} px" for (width, height), count in sorted(sizes.items()))
        yield (
            f"resolution {resolution.name}: {sum(visits.values())} of {counts.total()} visits, "
            f"by {len(visits)} of {plural(len(data.split.trained), 'sample')}: {listed or 'none'}"
        )
    allowed = "" if run.dataset.max_upscale is None else " that dataset.max_upscale allows"
    yield f"held-out samples and generated images have the largest resolution{allowed}"


def _captions(run: Run, samples: Sequence[Sample]) -> Iterator[str]:
    captions = [sample.caption for sample in samples]
    lengths = [len(caption) for caption in captions]
    yield f"captions: {min(lengths)} to {max(lengths)} characters, median {median(lengths):.0f}"
    for tokenizer, (counts, limit) in _count_tokens(run, captions).items():
        yield f"tokens ({tokenizer}): {min(counts)} to {max(counts)}; the model reads {limit}"
    yield from describe_long_captions(run, samples)
    shared = [group for group in _group(samples, lambda sample: sample.caption) if len(group) > 1]
    if shared and len(shared) < len(samples):
        largest = max(shared, key=len)
        total = sum(map(len, shared))
        yield f"{total} samples share {len(shared)} caption(s); {len(largest)} have {largest[0].caption!r:.60}"


def _tags(run: Run, data: TrainingData) -> Iterator[str]:
    if not run.dataset.shuffle_tags:
        return
    captions = {sample.caption for sample in data.split.trained}
    orders = {caption: set(shuffled_captions(run.dataset, caption)) for caption in captions}
    texts = sum(map(len, orders.values()))
    shuffled = sum(len(texts) > 1 for texts in orders.values())
    yield (
        f"tags: shuffled in {shuffled} of {plural(len(captions), 'training caption')}; "
        f"{run.dataset.tag_orders} orders of each make {plural(texts, 'text')} to encode"
    )


def _duplicates(data: TrainingData, samples: Sequence[Sample]) -> Iterator[str]:
    by_image = _group(samples, lambda sample: sample.image.digest())
    equal = [group for group in by_image if len(group) > 1]
    if equal:
        yield f"the same image is the target of several samples, {len(equal)} time(s): {_name_groups(equal)}"
    facts = data.listing.facts
    # One sample per image: equal images look alike in any case. Generated images have no facts.
    distinct = [group[0] for group in by_image if group[0].image in facts]
    near = [
        [distinct[i] for i in group] for group in find_near_duplicates([facts[sample.image] for sample in distinct])
    ]
    if near:
        yield f"images that look alike, {len(near)} group(s): {_name_groups(near)}"
    training = {sample.id for sample in data.split.trained}
    leaks = [group for group in (*equal, *near) if len({sample.id in training for sample in group}) == 2]
    if leaks:
        yield (
            f"both in training and held out, so that the held-out loss is too low, {len(leaks)} group(s): "
            f"{_name_groups(leaks)}"
        )


def _group(samples: Iterable[Sample], key: Callable[[Sample], str]) -> list[list[Sample]]:
    groups = defaultdict(list)
    for sample in samples:
        groups[key(sample)].append(sample)
    return list(groups.values())


def _name_groups(groups: Sequence[Sequence[Sample]]) -> str:
    names = []
    for group in groups[:MAX_EXAMPLES]:
        ids = ", ".join(sample.id for sample in group[:MAX_EXAMPLES])
        names.append("{" + ids + (", ..." if len(group) > MAX_EXAMPLES else "") + "}")
    return " ".join(names) + (" ..." if len(groups) > MAX_EXAMPLES else "")


def _write_contact_sheet(path: Path, data: TrainingData, samples: Sequence[Sample]) -> Path:
    """Writes an image of samples as the model sees them, evenly spread over the dataset. Returns its path."""
    from trainer.dataset import image_grid

    stride = max(1, len(samples) // SHEET_SAMPLES)
    transformed = [data.transform.apply(sample) for sample in samples[::stride][:SHEET_SAMPLES]]
    rows = [([*sample.control_pixels(), sample.pixels()], sample.caption) for sample in transformed]
    image_grid.save_png(path, image_grid.contact_sheet(rows))
    return path
