"""`Run`: the settings of every room assembled, the rules that cross rooms, the values that depend on several, the identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from trainer import dataset, evaluation, hardware, lr_scheduler, method, model, optimizer, precision, tracking
from trainer.cache import CacheSettings
from trainer.checkpoint import Save
from trainer.errors import Usage
from trainer.sample import Sampling

REQUIRED: Any = "???"


class Stage(Enum):
    train = "train"
    check = "check"
    cache = "cache"
    evaluate = "evaluate"
    sample = "sample"
    export = "export"


@dataclass(slots=True)
class Log:
    """Steps between two lines of the journal."""

    every: int = 1


@dataclass(slots=True)
class Run:
    """One run. A null is resolved by `resolved`; `steps` and `epochs` exclude each other."""

    model: model.Family = REQUIRED
    method: method.Method = REQUIRED
    precision: precision.Precision = REQUIRED
    optimizer: optimizer.Optimizer = REQUIRED
    lr_scheduler: lr_scheduler.LRScheduler = REQUIRED
    dataset: dataset.Dataset = REQUIRED
    hardware: hardware.Hardware = REQUIRED
    evaluation: evaluation.Evaluation = REQUIRED
    tracking: tracking.Tracking = REQUIRED
    sample: Sampling = field(default_factory=Sampling)
    save: Save = field(default_factory=Save)
    log: Log = field(default_factory=Log)
    cache: CacheSettings = field(default_factory=CacheSettings)
    stage: Stage = Stage.train
    run: str | None = None
    resume: str | None = None
    steps: int | None = None
    epochs: int | None = None
    batch: int | None = None
    seed: int = 0
    name: str | None = None
    out: str = "runs"
    fresh: bool = False
    max_grad_norm: float = 1.0
    ema: float | None = None


ROOMS = {
    "model": model.families(),
    "method": method.OPTIONS,
    "precision": precision.OPTIONS,
    "optimizer": optimizer.OPTIONS,
    "lr_scheduler": lr_scheduler.OPTIONS,
    "dataset": dataset.OPTIONS,
    "hardware": hardware.OPTIONS,
    "evaluation": evaluation.OPTIONS,
    "tracking": tracking.OPTIONS,
}
OPTION_OF = {kind: name for options in ROOMS.values() for name, kind in reversed(options.items())}
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
LOADED_STAGES = (Stage.evaluate, Stage.sample, Stage.export)
"""Stages that work on a run that is there, with its own settings."""
FREE_IN_LOADED_STAGES = ("stage", "run", "out", "sample", "evaluation", "hardware")


def register() -> None:
    """Offer the dataclasses to Hydra as `schema/run` and `schema/<room>/<option>`, on which the yaml files build."""
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=Run)
    for room, options in ROOMS.items():
        for name, settings in options.items():
            store.store(group=f"schema/{room}", name=name, node=settings)


def typed(composed: Any) -> Run:
    """The dataclasses of a composed configuration, with every rule checked and every null that has a rule resolved."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise Usage(f"{', '.join(missing)} must be set; type for example {missing[0]}=VALUE")
    run = resolved(OmegaConf.to_object(composed))
    check(run)
    return run


def from_yaml(path: Path) -> Run:
    """The settings that a run wrote down (`plain`), typed again."""
    values = yaml.safe_load(path.read_text())
    schema = OmegaConf.structured(Run)
    for room, options in ROOMS.items():
        kind = values[room].pop("kind")
        schema[room] = OmegaConf.structured(options[kind])
    return OmegaConf.to_object(OmegaConf.merge(schema, values))


def resolved(run: Run) -> Run:
    """The values that depend on several rooms, where the user has set none."""
    suggested = run.model.suggested
    if run.steps is not None and run.epochs is not None:
        raise Usage(f"steps={run.steps} and epochs={run.epochs} are both set; type only one of them")
    if run.steps is None and run.epochs is None:
        run = replace(run, steps=suggested.steps)
    if run.batch is None:
        run = replace(run, batch=suggested.batch)
    kind = option(run.method)
    if run.optimizer.lr is None:
        if kind not in suggested.learning_rate:
            raise Usage(f"this model names no learning rate for method={kind}; type optimizer.lr=1e-4 or another number")
        run = replace(run, optimizer=replace(run.optimizer, lr=suggested.learning_rate[kind]))
    if getattr(run.method, "alpha", 0) is None:
        run = replace(run, method=replace(run.method, alpha=run.method.rank * run.method.alpha_per_rank))
    if run.dataset.resolution is None:
        run = replace(run, dataset=replace(run.dataset, resolution=str(suggested.resolution)))
    sampling = replace(
        run.sample,
        steps=suggested.sample_steps if run.sample.steps is None else run.sample.steps,
        guidance=suggested.guidance if run.sample.guidance is None else run.sample.guidance,
    )
    images = suggested.evaluation_images if run.evaluation.images is None else run.evaluation.images
    return replace(run, sample=sampling, evaluation=replace(run.evaluation, images=images))


def check(run: Run) -> None:
    """Every rule that can be told from the settings alone; raises errors.Usage with what to type."""
    run.lr_scheduler.check(run.steps)
    for name in ("steps", "epochs", "batch"):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise Usage(f"{name}={value} trains nothing; type {name}=1 or more")
    if run.log.every < 1:
        raise Usage(f"log.every={run.log.every} is no number of steps; type 1 or more")
    if run.max_grad_norm <= 0:
        raise Usage(
            f"max_grad_norm={run.max_grad_norm:g} stops every update; type a number above 0, or a very large one such as 1e9 for no clipping"
        )
    if run.ema is not None and not 0 < run.ema < 1:
        raise Usage(f"ema={run.ema:g} is no decay between 0 and 1; type for example ema=0.999, or ema=null for none")
    if run.precision.storage is precision.Storage.bf16 and run.precision.compute is precision.Compute.float32:
        raise Usage(
            "precision=bf16 stores weights that float32 products cannot take; type precision=fp32, or leave precision.compute=bfloat16"
        )
    if run.stage in LOADED_STAGES and run.run is None:
        raise Usage(f"stage={run.stage.value} works on a run that is there; type run=ID (a folder of {run.out}/) or run=FOLDER")
    if run.run is not None and run.stage not in LOADED_STAGES:
        raise Usage(f"run={run.run} goes with stage=evaluate, sample or export; to continue training type resume={run.run}")
    if run.resume is not None and run.fresh:
        raise Usage("resume and fresh=true contradict each other; type resume=FOLDER to continue that run, or fresh=true for a new one")


def option(settings: Any) -> str:
    """The name of the option whose dataclass this is; of several options that share one dataclass, the first."""
    return OPTION_OF[type(settings)]


def plain(value: Any) -> Any:
    """Settings as what JSON has; enums by name; `kind` in a room names its option."""
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        values = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return {"kind": option(value), **values} if type(value) in OPTION_OF else values
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def decisive(run: Run) -> dict[str, Any]:
    """The settings that decide the path of the weights, resolved: what the identity is made of, and MLflow's params.

    Not among them: where the data lie, how fast it goes, what is watched. What a model suggests counts where they are used.
    """
    everything = plain(run)
    settings = {name: everything[name] for name in DECIDES_WEIGHTS}
    del settings["model"]["suggested"]
    del settings["dataset"]["path"]
    return settings


def identity(run: Run) -> str:
    """Twelve hex digits that name the run."""
    return hashlib.sha256(json.dumps(decisive(run), sort_keys=True).encode()).hexdigest()[:12]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    result = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`name: old -> new` for each dotted name whose value is not the same."""
    old, new = flat(old), flat(new)
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def keys(composed: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a composed configuration."""
    found = []
    for name in composed:
        value = composed._get_node(name)
        found.append(f"{prefix}{name}")
        if OmegaConf.is_dict(value) and not value._is_none() and not value._is_missing():
            found += keys(value, f"{prefix}{name}.")
    return found
