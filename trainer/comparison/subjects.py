"""The networks of a comparison: a run, other runs, and networks before training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from trainer.config import rules
from trainer.config.compose import read_run
from trainer.config.schema import Run
from trainer.core.errors import UsageError
from trainer.training.checkpoint import load_best_weights
from trainer.training.run_folder import find_run_folder

BASE = "base"


@dataclass(frozen=True, slots=True)
class Subject:
    """A network: the best weights of a run, or those before training."""

    name: str
    """Short and unique in the comparison."""
    run: Run
    """Settings of its run, with the dataset, prompts and seeds of the comparison."""
    folder: Path
    """Folder of its run."""
    step: int
    """Step of the weights; 0 before training."""

    @property
    def evaluation_folder(self) -> Path:
        return self.folder / "evaluation" / f"step-{self.step:08d}"


def find_subjects(run: Run) -> list[Subject]:
    """Returns the run that `run.run` names, and those of `evaluation.against`.

    Raises errors.UsageError if a run is unknown, occurs twice, has no checkpoint, or does not fit the dataset.
    """
    assert run.run is not None
    folder = find_run_folder(run.run, run.out)
    subjects = [Subject(folder.name, run, folder, _best_step(folder))]
    for text in run.evaluation.against:
        kind, _, name = text.partition(":")
        is_base = kind == BASE
        other = find_run_folder(name, run.out) if is_base and name else folder
        if not is_base:
            other = find_run_folder(text, run.out)
        its_run = run if other == folder else _with_settings_of(run, other)
        title = other.name if not is_base else BASE if other == folder else f"{BASE} of {other.name}"
        subject = Subject(title, its_run, other, 0 if is_base else _best_step(other))
        if any((found.folder.resolve(), found.step) == (other.resolve(), subject.step) for found in subjects):
            raise UsageError(f"evaluation.against names {text} twice, or the run itself; leave it out")
        if any(found.name == title for found in subjects):
            subject = replace(subject, name=str(other))
        subjects.append(subject)
    return subjects


def _with_settings_of(run: Run, folder: Path) -> Run:
    """Returns the settings of the run in `folder` with what all networks of a comparison share.

    These are dataset, prompts, seeds, device and cache; and for the same model also the settings of sampling. Another
    model samples with its own steps and guidance. Raises errors.UsageError if they do not fit together.
    """
    other = read_run(folder / "config.yaml")
    sample = run.sample
    if type(other.model) is not type(run.model):
        sample = replace(sample, steps=other.sample.steps, guidance=other.sample.guidance)
    combined = replace(
        other,
        dataset=run.dataset,
        evaluation=run.evaluation,
        sample=sample,
        hardware=run.hardware,
        cache=run.cache,
        tracking=run.tracking,
        stage=run.stage,
        run=str(folder),
        resume=None,
        out=run.out,
    )
    try:
        rules.check(combined)
    except UsageError as error:
        raise UsageError(f"{folder.name} cannot be compared with {run.run} on the data of that run: {error}") from error
    return combined


def _best_step(folder: Path) -> int:
    """Returns the step of the best weights of a run. Raises errors.DataError if it has none that are undamaged."""
    return load_best_weights(folder)[0]
