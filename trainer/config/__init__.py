"""`Run`: the settings of every room assembled, the rules that cross rooms, the values that depend on several, the identity."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer import dataset, evaluation, hardware, lr_scheduler, method, model, optimizer, precision, tracking
from trainer.config.groups import CONF as CONF
from trainer.config.groups import GROUPS
from trainer.config.sections import POST_TRAINING_STAGES, CacheSettings, Export, Format, Log, Sampling, Save, Stage
from trainer.core import redaction
from trainer.core.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

REQUIRED: Any = "???"


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
    export: Export = field(default_factory=Export)
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
    skip_nonfinite: int = 0
    ema: float | None = None


OPTION_OF = {kind: name for options in GROUPS.values() for name, kind in reversed(options.items())}
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
FREE_IN_POST_TRAINING_STAGES = (
    "stage",
    "run",
    "out",
    "sample",
    "export",
    "evaluation",
    "hardware",
    "cache",
    "dataset.path",
)
"""What may be typed beside `run`."""


@cache
def register() -> None:
    """Offer the dataclasses to Hydra as `schema/run` and `schema/<room>/<option>`, on which the yaml files build."""
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=Run)
    for room, options in GROUPS.items():
        for name, settings in options.items():
            schema = OmegaConf.structured(settings)
            for _, value in schema.items_ex(resolve=False):
                if OmegaConf.is_dict(value) and OmegaConf.get_type(value) is dict:
                    # A table of the user's own names: `key={name: value}` shall need no +.
                    OmegaConf.set_struct(value, False)
            store.store(group=f"schema/{room}", name=name, node=schema)


def typed(composed: DictConfig, overrides: Sequence[str] = (), find: Callable[[str, str], Path] | None = None) -> Run:
    """The dataclasses of a composed configuration, with every rule checked and every null that has a rule resolved.

    Where it names a run by `run` or `resume`, `find(name, out)` gives that run's folder, and the run's own settings stand under what was
    typed (`overrides`: key=value). Raises errors.UsageError, and OmegaConf's errors for what has no such setting or type.
    """
    strange = unknown_keys(composed)
    if strange:
        raise UsageError(unknown(strange[0], [key for key in keys(composed) if key not in strange]))
    contradictions(composed)
    name = composed.run or composed.resume
    if name is not None and find is not None:
        composed = continued(composed, find(name, composed.out), overrides)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UsageError(f"{', '.join(missing)} must be set; type for example {missing[0]}=VALUE")
    run = resolved(OmegaConf.to_object(composed))
    check(run)
    return run


def contradictions(run: Run | DictConfig) -> None:
    """The rules on which run is meant. Raises errors.UsageError."""
    if run.stage in POST_TRAINING_STAGES:
        if run.run is None:
            raise UsageError(
                f"stage={run.stage.value} works on a run that is there; type run=ID (a folder of {run.out}/) or run=FOLDER"
            )
        if run.resume is not None:
            raise UsageError(
                f"resume={run.resume} continues training, which stage={run.stage.value} does not; type run={run.resume} instead"
            )
    elif run.run is not None:
        raise UsageError(
            f"run={run.run} goes with stage=evaluate, sample or export; to continue training type resume={run.run}"
        )
    if run.resume is not None and run.fresh:
        raise UsageError(
            "resume and fresh=true contradict each other; type resume=FOLDER to continue that run, or fresh=true for a new one"
        )


def continued(composed: DictConfig, folder: Path, overrides: Sequence[str]) -> DictConfig:
    """The settings that the run in `folder` wrote down, under those of `composed` that were typed."""
    typed = [text.lstrip("+").partition("=")[0] for text in overrides]
    if composed.stage in POST_TRAINING_STAGES:
        others = [
            key for key in typed if not f"{key}.".startswith(tuple(f"{free}." for free in FREE_IN_POST_TRAINING_STAGES))
        ]
        if others:
            raise UsageError(
                f"stage={composed.stage.value} uses the own settings of the run in {folder}, so {', '.join(others)} cannot be typed beside it; "
                f"leave it out ({', '.join(FREE_IN_POST_TRAINING_STAGES)} may be typed)"
            )
    path = folder / "config.yaml"
    # An experiment sets many keys at once: what it composes is then compared as a whole.
    whole = any(is_group(key) and key not in GROUPS for key in typed)
    if composed.stage not in POST_TRAINING_STAGES and (whole or not path.is_file()):
        return composed
    own = written(path)
    length = {"steps", "epochs"}
    for key in [*typed, *(length if length & set(typed) else ()), "stage", "run", "resume", "fresh"]:
        if "." in key:
            OmegaConf.update(own, key, OmegaConf.select(composed, key), merge=False)
        else:
            own[key] = composed[key]
    if "out" not in typed:
        # Where the run lies now: folders may be moved.
        own.out = str(folder.parent)
    return own


def from_yaml(path: Path) -> Run:
    """The settings that a run wrote down (`plain`), typed again. Raises errors.DataError."""
    return OmegaConf.to_object(written(path))


def written(path: Path) -> DictConfig:
    try:
        values = yaml.safe_load(path.read_text())
        schema = OmegaConf.structured(Run)
        for room, options in GROUPS.items():
            schema[room] = OmegaConf.structured(options[values[room].pop("kind")])
        return OmegaConf.merge(schema, values)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        yaml.YAMLError,
        OmegaConfBaseException,
    ) as error:
        raise DataError(
            f"{path} does not hold the settings of a run ({str(error).splitlines()[0]}); restore it, or start a run of its own"
        ) from error


def resolved(run: Run) -> Run:
    """The values that depend on several rooms, where the user has set none."""
    suggested = run.model.suggested
    if option(run.method) not in run.model.methods:
        raise UsageError(
            f"method={option(run.method)}: this model is trained by {', '.join(run.model.methods)}; type method={run.model.methods[0]}"
        )
    if run.steps is not None and run.epochs is not None:
        raise UsageError(f"steps={run.steps} and epochs={run.epochs} are both set; type only one of them")
    if run.steps is None and run.epochs is None:
        run = replace(run, steps=suggested.steps)
    if run.batch is None:
        run = replace(run, batch=suggested.batch)
    kind = option(run.method)
    if run.optimizer.lr is None:
        rate = run.optimizer.own_lr or suggested.learning_rate.get(kind)
        if rate is None:
            raise UsageError(
                f"this model names no learning rate for method={kind}; type optimizer.lr=1e-4 or another number"
            )
        run = replace(run, optimizer=replace(run.optimizer, lr=rate))
    if getattr(run.method, "alpha", 0) is None:
        run = replace(run, method=replace(run.method, alpha=run.method.rank * run.method.alpha_per_rank))
    if not getattr(run.method, "targets", True):
        run = replace(run, method=replace(run.method, targets=list(run.model.targets)))
    if getattr(run.dataset, "task", 0) is None:
        run = replace(
            run,
            dataset=replace(run.dataset, task=dataset.Task.edit if max(run.model.controls) else dataset.Task.describe),
        )
    # A square in one spelling.
    width, height = run.dataset.size() or (suggested.resolution, suggested.resolution)
    run = replace(run, dataset=replace(run.dataset, resolution=str(width) if width == height else f"{width}x{height}"))
    sampling = replace(
        run.sample,
        steps=suggested.sample_steps if run.sample.steps is None else run.sample.steps,
        guidance=suggested.guidance if run.sample.guidance is None else run.sample.guidance,
    )
    images = suggested.evaluation_images if run.evaluation.images is None else run.evaluation.images
    return replace(run, sample=sampling, evaluation=replace(run.evaluation, images=images))


def check(run: Run) -> None:
    """Every rule that can be told from the settings alone; raises errors.UsageError with what to type."""
    contradictions(run)
    for name, value in flat(plain(run)).items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise UsageError(f"{name}={value} is not finite; type a number")
            if isinstance(item, str) and redaction.contains_secret(item):
                raise UsageError(
                    f"{name} holds an access token or a password, which would be written into the run's folder; leave it out"
                )
    for name in ("steps", "epochs", "batch"):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}={value} trains nothing; type {name}=1 or more")
    if run.cache.drop_unused and run.stage is not Stage.cache:
        raise UsageError("cache.drop_unused=true deletes, which only stage=cache does; type stage=cache beside it")
    run.lr_scheduler.check(run.steps)
    run.model.objective.check_sample_steps(run.sample.steps)
    run.export.select(run.method.formats)
    if not run.out:
        raise UsageError("out is empty; type out=FOLDER, the place of the runs")
    if run.max_grad_norm <= 0:
        raise UsageError(
            f"max_grad_norm={run.max_grad_norm:g} stops every update; type a number above 0, or a very large one such as 1e9 for no clipping"
        )
    if run.skip_nonfinite < 0:
        raise UsageError(
            f"skip_nonfinite={run.skip_nonfinite} is no number of steps; type 0 to stop at the first loss that is not finite, or how many in a row to skip"
        )
    if run.ema is not None and not 0 < run.ema < 1:
        raise UsageError(
            f"ema={run.ema:g} is no decay between 0 and 1; type for example ema=0.999, or ema=null for none"
        )
    if getattr(run.method, "alpha", 1) <= 0:
        raise UsageError(
            f"method.alpha={run.method.alpha:g} leaves the adapter without effect; type a number above 0 (also for method.alpha_per_rank)"
        )
    if run.evaluation.patience is not None and run.dataset.validation_fraction == 0:
        raise UsageError(
            "evaluation.patience needs samples that are held out; type dataset.validation_fraction=0.15 or another share above 0"
        )
    storage, compute = run.precision.storage, run.precision.compute
    if storage in (precision.Storage.bf16, precision.Storage.fp16) and compute is precision.Compute.float32:
        raise UsageError(
            f"precision={storage.name} stores weights that float32 products cannot take; type precision=fp32, or "
            f"leave precision.compute={storage.value}"
        )
    if storage.quantised and not run.method.freezes:
        raise UsageError(
            f"precision={storage.name} stores what is frozen, and with method={option(run.method)} nothing is frozen; type method=lora, or "
            f"precision={precision.Storage(compute.value).name}"
        )
    if getattr(run.method, "master_weights", method.Master.fp32) is method.Master.none:
        if storage is not precision.Storage.bf16:
            raise UsageError(
                f"method.master_weights=none rounds updates to bfloat16, and precision={storage.name} is another type; type precision=bf16, or "
                "method.master_weights=fp32"
            )
        if run.optimizer.looks_at_all:
            raise UsageError(
                f"method.master_weights=none updates one tensor after another, and optimizer={option(run.optimizer)} finds its rate by all of "
                "them together; type optimizer=adamw, or method.master_weights=fp32"
            )
    check_card(run, run.hardware.card)


def check_card(run: Run, card: hardware.Card) -> None:
    """Raises errors.UsageError, with what to type, for what a card cannot do. A fact that is not known refuses nothing."""
    able = {"bfloat16": card.bfloat16, "float16": card.float16}
    storage, compute = run.precision.storage, run.precision.compute
    lacking = [kind.value for kind in (storage, compute) if able.get(kind.value) is False]
    if lacking:
        instead = next((kind for kind, can in able.items() if can), "float32")
        remedy = (
            f"precision={precision.Storage(instead).name}"
            if storage.value in lacking
            else f"precision.compute={instead}"
        )
        raise UsageError(f"hardware: {card.name} is not made to train in {lacking[0]}; type {remedy}")
    if storage.needs_bitsandbytes and card.bitsandbytes is False:
        raise UsageError(
            f"precision={storage.name} is read by bitsandbytes, which does not run on {card.name}; type precision=fp8 or precision=int8"
        )
    if run.optimizer.needs_bitsandbytes and card.bitsandbytes is False:
        raise UsageError(
            f"optimizer={option(run.optimizer)}: bitsandbytes has no optimizer for {card.name}; type optimizer=adamw"
        )


def check_sharded(run: Run) -> None:
    """Every rule of a run whose network is divided among processes; raises errors.UsageError with what to type."""
    whole = "or start it without accelerate's FSDP, where each process holds the whole network (launch/gpus.yaml)"
    storage = run.precision.storage
    if storage.needs_bitsandbytes or storage is precision.Storage.native:
        raise UsageError(
            f"precision={storage.name}: weights packed so cannot be divided among processes; type precision=fp8, {whole}"
        )
    if run.method.reads_inside:
        raise UsageError(
            f"method={option(run.method)} reads weights outside of a forward pass, where each process has a part of them; start it "
            "without accelerate's FSDP, where each process holds the whole network (launch/gpus.yaml)"
        )
    if not run.method.freezes and not run.optimizer.takes_parts:
        raise UsageError(
            f"optimizer={option(run.optimizer)} needs whole tensors, and each process has a part of them; type optimizer=adamw, {whole}"
        )
    if getattr(run.method, "master_weights", method.Master.fp32) is method.Master.none:
        raise UsageError(
            f"method.master_weights=none rounds whole tensors, and each process has a part of them; leave it out, {whole}"
        )
    if run.hardware.compile:
        raise UsageError(
            f"hardware.compile=true does not go with a network that is divided among processes; leave it out, {whole}"
        )
    if run.export.formats and Format.pipeline in run.export.formats:
        raise UsageError(
            "export.formats: no process has the whole network that pipeline writes; leave it out, and type stage=export run=<id> "
            "export.formats=[pipeline] when the run is finished"
        )


def open_device(run: Run) -> torch.device:
    """The device of the run, which can do what the run asks. Raises errors.UsageError."""
    device = run.hardware.open()
    check_card(run, hardware.card(device))
    return device


def remedies(run: Run) -> list[str]:
    """What to type where not even a single sample has room, what costs least first."""
    storage, adapter = run.precision.storage, run.method.freezes
    found = []
    if not run.hardware.gradient_checkpointing:
        found.append("hardware.gradient_checkpointing=true (the same result, more slowly)")
    if not adapter and not run.optimizer.needs_bitsandbytes and run.hardware.card.bitsandbytes is not False:
        found.append("optimizer=adamw8bit")
    if storage is precision.Storage.fp32 and run.hardware.card.bfloat16 is not False:
        found.append("precision=bf16")
    elif adapter and storage in (precision.Storage.bf16, precision.Storage.fp16):
        found.append("precision=fp8")
    if not adapter:
        found.append("method=lora")
    width, height = run.dataset.size()
    smaller = [max(side // 2, 16) for side in (width, height)]
    found.append(f"dataset.resolution={smaller[0]}" + (f"x{smaller[1]}" if width != height else ""))
    return found


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
    for room, options in GROUPS.items():
        # Options that share a dataclass differ by its values alone; the kind of all would be the name of the first.
        if room in settings and list(options.values()).count(type(getattr(run, room))) > 1:
            del settings[room]["kind"]
    # It has led to alpha, which may as well be typed.
    settings["method"].pop("alpha_per_rank", None)
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
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)
    ]


def keys(composed: DictConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a composed configuration."""
    return [key for key, _ in _walk(composed, prefix)]


def unknown_keys(composed: DictConfig) -> list[str]:
    """Keys that are no field of the dataclass they were added to: `+key=value` asks no schema."""
    return [key for key, known in _walk(composed, "") if not known]


def _walk(node: DictConfig, prefix: str) -> Iterator[tuple[str, bool]]:
    kind = OmegaConf.get_type(node)
    known = {f.name for f in fields(kind)} if is_dataclass(kind) else set(node)
    for name in node:
        yield f"{prefix}{name}", name in known
        value = node._get_node(name)
        if (
            OmegaConf.is_dict(value)
            and not value._is_none()
            and not value._is_missing()
            and not value._is_interpolation()
        ):
            yield from _walk(value, f"{prefix}{name}.")


def is_group(key: str) -> bool:
    """Whether an override of this key chooses an option of a group: all that is no setting."""
    return "." not in key and (key in GROUPS or key not in {f.name for f in fields(Run)})


def unknown(wrong: str, known: Sequence[str]) -> str:
    """What to say of a key that is not among the known ones: the setting of the same name elsewhere, or the nearest."""
    known = [key for key in known if ".suggested." not in key and not wrong.startswith(f"{key}.")]
    if wrong in known:
        room = wrong.partition(".")[0]
        return f"{wrong}: the {room} that is chosen beside it has no such setting; type another {room}=OPTION, or leave one of the two out"
    leaf = {key: key.rpartition(".")[2] for key in known}
    last = wrong.rpartition(".")[2]
    near = [key for key in known if leaf[key] == last or _initials(last) == leaf[key] or last == _initials(leaf[key])]
    near = near or difflib.get_close_matches(wrong, known, 1, 0.75)
    if not near:
        nearest = difflib.get_close_matches(last, leaf.values(), 1, 0.65)
        near = [key for key in known if leaf[key] in nearest]
    text = f"{wrong}: there is no such setting"
    if near:
        return f"{text}; did you mean {' or '.join(near[:3])}?"
    room = wrong.partition(".")[0]
    if own := [key for key in known if key.startswith(f"{room}.")]:
        return f"{text}; here {room} has only {', '.join(key.partition('.')[2] for key in own)}."
    return f"{text}; --cfg job lists all."


def _initials(name: str) -> str | None:
    """learning_rate -> lr"""
    return "".join(word[0] for word in name.split("_") if word) if "_" in name else None


def expected_type(refusal: str) -> str | None:
    """What a setting takes, told from OmegaConf's refusal of another value; None where that says it as well."""
    kinds = {
        "to Integer": "a whole number",
        "to Float": "a number such as 0.1 or 1e-4",
        "valid bool": "true or false",
        "to string": "text",
        "not Optional": "a value, not null",
        "not a subclass": "one of the settings in it, as group.key=value",
        "is not a ListConfig": "a list such as [a,b]",
        "with ListConfig": "a list such as [a,b]",
    }
    if found := re.search(r"expected one of \[(.*)\]", refusal):
        return f"one of {found[1]}"
    return next((kind for words, kind in kinds.items() if words in refusal), None)
