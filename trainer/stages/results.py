"""What the stages return: names, measurements and paths of files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trainer.core import files


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A trained run."""

    id: str
    """Name of the run folder, for `run=` and `resume=`."""
    folder: Path
    steps: int
    """Number of steps trained so far."""
    last_loss: float | None
    """Held-out loss at the end; None if no samples are held out."""
    best_loss: float | None
    """Lowest held-out loss. `sample`, `evaluate` and the exports use the weights of that step."""
    psnr: float | None
    """Mean PSNR of the last generated images against their targets, in dB; None if there are no targets."""
    images: list[Path]
    """Strips of the last evaluation: control images, before training, now and target side by side."""
    exports: list[Path]
    """Files and folders for other programs."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the result of a run from its folder, which must have a summary."""
        # `import trainer` imports this module, and must not import OmegaConf.
        from trainer.training.run_folder import RunSummary

        summary = RunSummary.read(folder)
        evaluations = sorted((folder / "pictures").glob("step-*"))
        exports = (folder / "export").glob("*")
        return cls(
            id=folder.name,
            folder=folder,
            steps=summary.steps,
            last_loss=summary.last_loss,
            best_loss=summary.best_loss,
            psnr=summary.psnr,
            images=strips(evaluations[-1]) if evaluations else [],
            exports=sorted(path for path in exports if not path.name.startswith(files.PARTIAL_PREFIX)),
        )

    @property
    def loss(self) -> float | None:
        """The held-out loss by which a sweep ranks the run."""
        return self.last_loss


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Measurements of a run's best weights."""

    id: str
    """Name of the run folder."""
    folder: Path
    """Folder of this evaluation."""
    step: int
    """Step of the weights."""
    loss: float | None
    """Held-out loss; None if no samples are held out."""
    metrics: dict[str, float]
    before_training: dict[str, float]
    """The same metrics at step 0."""
    images: list[Path]
    """Strips: control images, before training, now and target side by side."""
    report: Path
    """`report.html`, with the measurements of the images and the comparison with other networks."""


@dataclass(frozen=True, slots=True)
class SamplingResult:
    """Images generated with a run's best weights."""

    id: str
    """Name of the run folder."""
    folder: Path
    """Folder of the images."""
    step: int
    """Step of the weights."""
    images: list[Path]
    captions: list[str]
    """The prompt of each image."""


StageResult = TrainingResult | EvaluationResult | SamplingResult


def held_out_loss(result: StageResult | None) -> float | None:
    """Returns what a sweeper minimizes."""
    return None if result is None or isinstance(result, SamplingResult) else result.loss


def strips(folder: Path) -> list[Path]:
    """Returns the strips of an evaluation in their order: `1-strip.png`, `2-strip.png`, ..."""

    def number(path: Path) -> int:
        digits: Any = re.match(r"\d+", path.name)
        return int(digits[0]) if digits else 0

    return sorted(folder.glob("*-strip.png"), key=number)
