"""The networks of a comparison: a run, other runs, and networks before training."""

from __future__ import annotations

from collections.abc import Sequence
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

    Raises errors.UsageError if a run is unknown, occurs twice or does not fit the dataset, errors.DataError if it has
    no weights.
    """
    subjects: list[Subject] = []
    for folder, is_base in _named(run):
        first = subjects[0].folder if subjects else folder
        name = folder.name if not is_base else BASE if folder == first else f"{BASE} of {folder.name}"
        if any(subject.name == name for subject in subjects):
            raise UsageError(
                f"evaluation.against names {name} twice, or the run itself; leave it out. Other runs with the folder "
                "name of this one cannot be compared with it"
            )
        settings = run if folder == first else _with_settings_of(run, folder)
        subjects.append(Subject(name, settings, folder, 0 if is_base else load_best_weights(folder)[0]))
    return subjects


def run_folders(run: Run) -> list[Path]:
    """Returns the folders of the runs of a comparison, `run.run` first. Raises errors.UsageError."""
    return list(dict.fromkeys(folder for folder, _ in _named(run)))


def comparison_folder(run: Run, folders: Sequence[Path]) -> Path:
    """Returns where the comparison of several runs is kept."""
    return Path(run.out) / "comparisons" / "-vs-".join(folder.name for folder in folders)


def _named(run: Run) -> list[tuple[Path, bool]]:
    """Returns the folder of each network's run, and whether it is the network before training."""
    assert run.run is not None
    first = find_run_folder(run.run, run.out)
    found = [(first, False)]
    for text in run.evaluation.against:
        kind, _, name = text.partition(":")
        if kind == BASE:
            found.append((find_run_folder(name, run.out) if name else first, True))
        else:
            found.append((find_run_folder(text, run.out), False))
    # The same folder may be typed as an id and as a path.
    own = {folder.resolve(): folder for folder, _ in reversed(found)}
    return [(own[folder.resolve()], is_base) for folder, is_base in found]


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
