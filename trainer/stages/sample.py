"""`stage=sample`: generates images with the best weights of a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from trainer.config.identity import to_plain
from trainer.config.schema import Run
from trainer.config.sections import SplitName
from trainer.core import files
from trainer.core.console import print_line
from trainer.core.digests import Digests
from trainer.core.errors import UsageError
from trainer.dataset.sample import Sample
from trainer.dataset.source import FileSource, Source
from trainer.dataset.transform import TransformedSample
from trainer.stages.results import SamplingResult
from trainer.training.data import TrainingData, held_out_samples, prepare, unconditional_samples
from trainer.training.encoding import encode_missing
from trainer.training.trained_run import load_trained_run


def execute(run: Run) -> SamplingResult:
    """Writes images for `sample.prompts`, or for samples of the dataset if there are none, to `<run>/samples/...`.

    The name of the folder is a hash of the request, so that different requests do not overwrite each other. Images that
    exist already are not generated again.
    """
    from trainer.dataset import image_grid

    trained = load_trained_run(run)
    data = prepare(run)
    evaluator = trained.evaluator(data)
    samples = _samples_of_split(run, data) if run.sample.prompts is None else _prompted_samples(run, data)

    request = {"step": trained.step, "sample": to_plain(run.sample), "data": data.digests["data"]}
    name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    folder = trained.folder / "samples" / name
    paths = [folder / f"{i:05d}.png" for i in range(len(samples))]
    captions = [sample.caption for sample in samples]
    files.write_json(folder / "request.json", request | {"captions": captions})

    missing = [i for i, path in enumerate(paths) if not path.exists()]
    missing_samples = [samples[i] for i in missing]
    encode_missing(run, data, missing_samples + unconditional_samples(run, missing_samples))
    for index, image in evaluator.generate(missing_samples, [run.sample.seed + i for i in missing]):
        path = paths[missing[index]]
        image_grid.save_png(path, image)
        print_line(f"{path}: {missing_samples[index].caption}")
    if not missing:
        print_line(f"all {len(paths)} images are in {folder} already")
    return SamplingResult(trained.folder.name, folder, trained.step, paths, captions)


def _samples_of_split(run: Run, data: TrainingData) -> list[TransformedSample]:
    """Returns the first `sample.count` samples of `sample.split`."""
    split = run.sample.split
    assert run.evaluation.images is not None
    if split is SplitName.validation:
        return held_out_samples(data, run.sample.count or run.evaluation.images)
    samples = data.split.test if split is SplitName.test else data.split.train
    if not samples:
        raise UsageError(f"sample.split={split.value}: this dataset has no such part; type sample.split=validation")
    count = run.sample.count or (len(samples) if split is SplitName.test else run.evaluation.images)
    return [data.transform.apply(sample) for sample in samples[:count]]


def _prompted_samples(run: Run, data: TrainingData) -> list[TransformedSample]:
    """Returns a sample for each of `sample.prompts`, with `sample.images` as control images."""
    prompts, names = run.sample.prompts or [], run.sample.images or []
    if data.control_count and not names:
        raise UsageError(
            "this run edits images: type sample.images=[FILE] beside sample.prompts, "
            "one for all prompts or one for each"
        )
    if names and not data.control_count:
        raise UsageError("this run generates images from prompts alone: leave out sample.images")
    digests = Digests(data.cache.root / "digests.sqlite")
    controls: list[tuple[Source, ...]] = [(FileSource(Path(name).expanduser(), digests),) for name in names] or [()]
    # The target only determines the size.
    target = data.split.train[0].image
    samples = [Sample(f"prompt-{i}", target, prompt, controls[i % len(controls)]) for i, prompt in enumerate(prompts)]
    return [data.transform.apply(sample) for sample in samples]
