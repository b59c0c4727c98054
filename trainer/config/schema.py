"""`Run`, the settings of one run, and which of them decide the trained weights."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from omegaconf import MISSING

from trainer.config.groups import GROUPS
from trainer.config.sections import AlertLimits, CacheSettings, Export, Log, Sampling, Save, Stage
from trainer.core.settings import path_setting
from trainer.dataset import Dataset
from trainer.evaluation import Evaluation
from trainer.hardware import Hardware
from trainer.lr_scheduler import LRScheduler
from trainer.method import Method
from trainer.model import Family
from trainer.optimizer import Optimizer
from trainer.precision import Precision
from trainer.tracking import Tracking


@dataclass(slots=True)
class Run:
    """Settings of one run. `trainer.config.compose.resolve` replaces nulls that depend on several groups."""

    model: Family = MISSING
    method: Method = MISSING
    precision: Precision = MISSING
    optimizer: Optimizer = MISSING
    lr_scheduler: LRScheduler = MISSING
    dataset: Dataset = MISSING
    hardware: Hardware = MISSING
    evaluation: Evaluation = MISSING
    tracking: Tracking = MISSING
    sample: Sampling = field(default_factory=Sampling)
    save: Save = field(default_factory=Save)
    export: Export = field(default_factory=Export)
    log: Log = field(default_factory=Log)
    alerts: AlertLimits = field(default_factory=AlertLimits)
    cache: CacheSettings = field(default_factory=CacheSettings)
    stage: Stage = Stage.train
    run: str | None = path_setting(None)
    """Id or folder of the run that a post-training stage works on."""
    resume: str | None = path_setting(None)
    """Id or folder of the run to continue."""
    steps: int | None = None
    """Number of optimizer steps. Excludes `epochs`."""
    epochs: int | None = None
    batch: int | None = None
    """Samples per optimizer step, over all processes and micro-batches."""
    seed: int = 0
    name: str | None = None
    """Name of the run in the tracker."""
    out: str = path_setting("runs")
    """Folder that holds the folders of all runs."""
    fresh: bool = False
    """Start in a new folder even if the run exists."""
    max_grad_norm: float = 1.0
    skip_nonfinite: int = 0
    """Number of consecutive steps whose loss or gradient may be NaN or infinite. They update nothing."""
    ema: float | None = None
    """Decay of the moving average of the trained weights; None: no average."""


DECIDES_WEIGHTS = (
    "model",
    "method",
    "precision",
    "optimizer",
    "lr_scheduler",
    "dataset",
    "steps",
    "epochs",
    "batch",
    "seed",
    "max_grad_norm",
    "ema",
)
"""Settings that decide the trained weights. The identity of a run is computed from them."""
DATA_FOLDERS = ("dataset.path", "dataset.regularization.path")
"""Settings that say where the data lies. Not these, but the data itself decides the weights."""
FREE_IN_POST_TRAINING_STAGES = (
    "stage",
    "run",
    "out",
    "sample",
    "export",
    "evaluation",
    "hardware",
    "cache",
    *DATA_FOLDERS,
)
"""Settings that may be combined with `run`. All others are those of the existing run."""


def is_group(key: str) -> bool:
    """Returns whether an override `key=...` selects an option of a config group instead of setting a value."""
    return "." not in key and (key in GROUPS or key not in {f.name for f in fields(Run)})
