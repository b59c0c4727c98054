"""`stage=sample`: generates images with the best weights of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from trainer.model.keywords import KeywordWriter
from trainer.stages.results import SamplingResult
from trainer.training.data import TrainingData, held_out_samples, prepare, unconditional_samples
from trainer.training.encoding import encode_missing
from trainer.training.trained_run import TrainedRun, load_trained_run

if TYPE_CHECKING:
    import numpy as np


def execute(run: Run) -> SamplingResult:
    """Writes images for `sample.prompts`, or for samples of the dataset if there are none, to `<run>/samples/...`.

    The name of the folder is a hash of the request, so that different requests do not overwrite each other. Images that
    exist already are not generated again.
    """
    from trainer.dataset import image_grid

    trained = load_trained_run(run)
    data = prepare(run)
    samples = _samples_of_split(run, data) if run.sample.prompts is None else _prompted_samples(run, data)

    request = {"step": trained.step, "sample": to_plain(run.sample, for_identity=True), "data": data.digests["data"]}
    name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    folder = trained.folder / "samples" / name
    paths = [folder / f"{i:05d}.png" for i in range(len(samples))]
    captions = [sample.caption for sample in samples]
    files.write_json(folder / "request.json", request | {"captions": captions})

    missing = [i for i, path in enumerate(paths) if not path.exists()]
    missing_samples = [samples[i] for i in missing]
    encode_missing(run, data, missing_samples + unconditional_samples(run, missing_samples))
    seeds = [run.sample.seed + i for i in missing]
    if run.sample.preference_weights is None:
        for index, image in trained.evaluator(data).generate(missing_samples, seeds):
            path = paths[missing[index]]
            image_grid.save_png(path, image)
            print_line(f"{path}: {missing_samples[index].caption}")
    else:
        for index, image, scores in _generate_best(trained, data, missing_samples, seeds):
            path = paths[missing[index]]
            # First, so that each image has its scores.
            files.write_json(path.with_suffix(".json"), scores)
            image_grid.save_png(path, image)
            print_line(f"{path}: preference weight {scores['best']:g}, {missing_samples[index].caption}")
    if not missing:
        print_line(f"all {len(paths)} images are in {folder} already")
    return SamplingResult(trained.folder.name, folder, trained.step, paths, captions)


def _generate_best(
    trained: TrainedRun, data: TrainingData, samples: list[TransformedSample], seeds: list[int]
) -> Iterator[tuple[int, np.ndarray, dict[str, Any]]]:
    """Yields (index, image, scores) for each sample: the image with the best score of all preference weights.

    `scores` has the keywords, the similarities and score of each weight, and the best weight, the first of equals.
    """
    from trainer.evaluation.preference import preference_score
    from trainer.evaluation.vision import ClipModel

    settings, model = trained.run.sample, trained.run.model
    assert settings.clip is not None and settings.preference_weights is not None and isinstance(model, KeywordWriter)
    scorer = ClipModel("sample.clip", settings.clip, trained.device)
    runs = {
        weight: replace(trained.run, model=model.with_preference_weight(weight))
        for weight in settings.preference_weights
    }
    evaluators = {weight: replace(trained, run=run).evaluator(data) for weight, run in runs.items()}
    for i, sample in enumerate(samples):
        target, preference = model.keywords_of(data.cache.example(sample))
        images, tried = {}, []
        for weight, evaluator in evaluators.items():
            ((_, images[weight]),) = evaluator.generate([sample], [seeds[i]])
            to_target, to_preference = scorer.similarities(images[weight], [target, preference])
            score = preference_score(to_target, to_preference, settings.preference_share)
            tried.append({"weight": weight, "target": to_target, "preference": to_preference, "score": score})
        best = max(tried, key=lambda result: result["score"])["weight"]
        yield i, images[best], {"target": target, "preference": preference, "tried": tried, "best": best}


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
