"""`stage=evaluate`: measures the best weights of a run and compares them with other runs and the base model."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.comparison.images import (
    generate_missing,
    history_images,
    image_paths,
    numbered,
    read_images,
    sample_images,
    training_images,
)
from trainer.comparison.measure import chosen_metrics, measure
from trainer.comparison.record import FILE_NAME, Comparison, Network, Picture
from trainer.comparison.subjects import Subject, comparison_folder, find_subjects
from trainer.config.rules import open_device
from trainer.config.schema import Run
from trainer.core.console import print_line
from trainer.evaluation.metrics import Pictures, Setup
from trainer.evaluation.vision import check_readable
from trainer.report.write import REPORT, write_report
from trainer.stages.results import EvaluationResult, strips
from trainer.tracking.journal import Journal, read_records
from trainer.training.data import (
    TrainingData,
    held_out_samples,
    prepare,
    samples_to_generate,
    unconditional_samples,
)
from trainer.training.encoding import encode_missing
from trainer.training.trained_run import load_trained_run

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample

SHOWN = 24
"""Number of pictures whose controls and targets are kept for the report."""


def execute(run: Run, overrides: Sequence[str] = ()) -> EvaluationResult:
    """Generates images with each network, measures them, and writes evaluation.json and report.html.

    The images and measurements of a network are in `<its run>/evaluation/step-...`, and so is its comparison with the
    base. A comparison with other runs is in `<out>/comparisons/`.
    """
    metrics = chosen_metrics(run.evaluation)
    for name, path in _models(run).items():
        if path is not None:
            # Generating images may take hours; a mistyped name is reported before.
            check_readable(f"evaluation.{name}", path)
    subjects = find_subjects(run)
    networks, pictures = [], []
    data = None
    for subject in subjects:
        own = prepare(subject.run)
        data = data or own
        paths, values = _generate(subject, own)
        networks.append((subject, values))
        pictures.append(paths)
    assert data is not None
    folders = list(dict.fromkeys(subject.folder for subject in subjects))
    is_single = len(folders) == 1
    folder = subjects[0].evaluation_folder if is_single else comparison_folder(run, folders)
    comparison = _compare(run, data, networks, pictures, metrics, folder, overrides)
    first, now = networks[0]
    records = (record for _, record in read_records(first.folder / "journal.jsonl"))
    before = _metrics(record for record in records if record.get("step") == 0)
    comparison.write(folder, {"step": first.step, "now": now, "before_training": before})
    _print(comparison, now, before, first.step)
    report = (folders[0] if is_single else folder) / REPORT
    write_report(report, folders, folder)
    print_line(f"images and evaluation.json in {folder}, report {report}")
    _track(run, subjects, comparison, [report, folder / FILE_NAME])
    images = strips(first.evaluation_folder / "pictures" / first.evaluation_folder.name)
    return EvaluationResult(first.folder.name, folder, first.step, now.get("val/loss"), now, before, images, report)


def _generate(subject: Subject, data: TrainingData) -> tuple[list[Path], dict[str, float]]:
    """Generates the images of a network that do not exist, and returns their files and its other measurements."""
    run, folder = subject.run, subject.evaluation_folder
    trained = load_trained_run(replace(run, run=str(subject.folder)))
    evaluator = trained.evaluator(data, before_training=subject.step == 0)
    samples = [sample for sample, _ in samples_to_generate(run, data)]
    encode_missing(run, data, held_out_samples(data, run.evaluation.samples) + samples)
    encode_missing(run, data, unconditional_samples(run, samples))
    seeds = _seeds(run, samples)
    paths = image_paths(subject, samples, seeds)
    generate_missing(evaluator, paths, samples, seeds, subject.name)
    (folder / "journal.jsonl").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder) as journal:
        images = numbered(read_images(paths))
        evaluator.evaluate(subject.step, folder, journal, before=subject.folder, generated=images)
        return paths, _metrics(journal.records())


def _compare(
    run: Run,
    data: TrainingData,
    networks: Sequence[tuple[Subject, dict[str, float]]],
    paths: Sequence[Sequence[Path]],
    metrics: Any,
    folder: Path,
    overrides: Sequence[str],
) -> Comparison:
    """Measures the images in `paths` of each network."""
    samples = samples_to_generate(run, data)
    generated = [sample for sample, _ in samples]
    comparable = all(has_target for _, has_target in samples)
    first_index: dict[Any, int] = {}
    prompts = [first_index.setdefault(sample, len(first_index)) for sample in generated]
    training = training_images(data, run.evaluation.training_images)
    setup = Setup(
        open_device(run),
        _models(run),
        run.evaluation.lpips,
        sample_images(training),
        [sample.sample.image.name for sample in training],
    )
    targets = sample_images(generated) if comparable else None
    captions = [sample.caption for sample in generated]
    histories = [history_images(sample) for sample in generated] if comparable and generated[0].sample.history else []
    measurements, left_out = measure(
        metrics,
        setup,
        [
            Pictures(subject.name, read_images(files), captions, prompts, targets, histories)
            for (subject, _), files in zip(networks, paths, strict=True)
        ],
    )
    rows = [
        Picture(
            sample.caption,
            seed,
            prompt,
            {subject.name: _relative(files[i], folder) for (subject, _), files in zip(networks, paths, strict=True)},
            _save_references(folder, i, sample, comparable) if i < SHOWN else {},
        )
        for i, (sample, seed, prompt) in enumerate(zip(generated, _seeds(run, generated), prompts, strict=True))
    ]
    command = shlex.join(["python", "-m", "trainer", *overrides])
    described = [
        Network(subject.name, _relative(subject.folder, folder), subject.step, values) for subject, values in networks
    ]
    return Comparison(command, described, rows, measurements, left_out)


def _models(run: Run) -> dict[str, str | None]:
    """Returns the settings of `Setup.models`."""
    return {name: getattr(run.evaluation, name) for name in ("clip", "dino", "features")}


def _save_references(folder: Path, number: int, sample: TransformedSample, comparable: bool) -> dict[str, str]:
    """Saves the control images and the target of a picture. Returns title -> file, relative to `folder`."""
    from trainer.dataset import image_grid

    titles = {name: name.replace("_", " ") for name in sample.control_names} | (
        {"image": "target"} if comparable else {}
    )
    found = {}
    for name, title in titles.items():
        path = folder / "references" / f"{number:05d}-{title.replace(' ', '_')}.png"
        image_grid.save_png(path, sample.pixels(name))
        found[title] = _relative(path, folder)
    return found


def _print(comparison: Comparison, now: dict[str, float], before: dict[str, float], step: int) -> None:
    for name in ("val/loss", "val/psnr"):
        if name in now:
            past = f", before training {before[name]:.4f}" if name in before else ""
            print_line(f"{name} {now[name]:.4f} at step {step}{past}")
    for measurement in comparison.measurements:
        unit = f" {measurement.unit}" if measurement.unit else ""
        values = []
        for name, (value, low, high) in measurement.estimates.items():
            interval = "" if low is None or high is None else f" ({low:.4g} to {high:.4g})"
            values.append(f"{name} {value:.4g}{unit}{interval}")
        print_line(f"{measurement.title}: {', '.join(values)}")
    for text in comparison.verdicts():
        print_line(text)
    for text in comparison.warnings():
        print_line(f"note: {text}")
    for reason in dict.fromkeys(comparison.left_out.values()):
        names = [name for name, its_reason in comparison.left_out.items() if its_reason == reason]
        print_line(f"left out: {', '.join(names)}: {reason}")


def _track(run: Run, subjects: Sequence[Subject], comparison: Comparison, paths: Sequence[Path]) -> None:
    """Adds the measurements to the runs in the tracker. Those before training become values at step 0."""
    for folder in dict.fromkeys(subject.folder for subject in subjects):
        metrics = {
            subject.step: {f"evaluate/{m.metric}": m.estimates[subject.name].value for m in comparison.measurements}
            for subject in subjects
            if subject.folder == folder
        }
        if reason := run.tracking.attach(folder, Path(run.out), metrics, paths, "evaluation"):
            print_line(f"note: {folder.name}: {reason}")


def _seeds(run: Run, samples: Sequence[object]) -> list[int]:
    return [run.sample.seed + i for i in range(len(samples))]


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()


def _metrics(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Returns the last value of each metric."""
    return {name: value for record in records for name, value in record.get("values", {}).items()}
