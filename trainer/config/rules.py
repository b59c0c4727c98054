"""Rules about settings that concern several groups or the run as a whole.

Each function raises errors.UsageError with a message that says what to type instead. Rules about a single group are in
that group's package.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trainer.config.groups import option_name
from trainer.config.identity import flatten, to_plain
from trainer.config.schema import Run
from trainer.config.sections import POST_TRAINING_STAGES, Format, Stage
from trainer.core import redaction
from trainer.core.dtypes import Dtype
from trainer.core.errors import UsageError
from trainer.dataset import size_name
from trainer.hardware import Card
from trainer.hardware.devices import detect_card
from trainer.precision import Storage

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig


def check(run: Run) -> None:
    """Checks every rule that depends on the settings alone."""
    check_which_run(run)
    _check_values(run)
    _check_root_settings(run)
    _check_combinations(run)
    run.lr_scheduler.check(run.steps)
    assert run.sample.steps is not None, "the run is resolved"
    run.model.objective.check_sample_steps(run.sample.steps)
    run.export.select(run.method.formats, run.model.unsupported_formats)
    _check_precision(run)
    _check_stochastic_rounding(run)
    _check_average(run)
    check_card(run, run.hardware.card)


def check_which_run(run: Run | DictConfig) -> None:
    """Checks the settings that say which run is meant."""
    if run.stage in POST_TRAINING_STAGES:
        if run.run is None:
            raise UsageError(
                f"stage={run.stage.value} works on an existing run; type run=ID (a folder of {run.out}/) or run=FOLDER"
            )
        if run.resume is not None:
            raise UsageError(
                f"resume={run.resume} continues training, which stage={run.stage.value} does not do; type "
                f"run={run.resume} instead"
            )
    elif run.run is not None:
        raise UsageError(
            f"run={run.run} needs stage=evaluate, sample, export or report; to continue training type resume={run.run}"
        )
    if run.resume is not None and run.fresh:
        raise UsageError(
            "resume and fresh=true contradict each other; type resume=FOLDER to continue that run, or fresh=true to "
            "start a new one"
        )


def _check_values(run: Run) -> None:
    """Refuses infinite numbers, NaN, and text that contains a secret."""
    for key, value in flatten(to_plain(run)).items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise UsageError(f"{key}={value} is not finite; type a number")
            if isinstance(item, str) and redaction.contains_secret(item):
                raise UsageError(
                    f"{key} holds an access token or a password, which would be written to the run folder; leave it out"
                )


def _check_root_settings(run: Run) -> None:
    if not run.out:
        raise UsageError("out is empty; type out=FOLDER, the folder for all runs")
    for name in ("steps", "epochs", "batch"):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}={value} trains nothing; type {name}=1 or more")
    if run.max_grad_norm <= 0:
        raise UsageError(
            f"max_grad_norm={run.max_grad_norm:g} prevents every update; type a number above 0, or a very large one "
            "such as 1e9 for no clipping"
        )
    if run.skip_nonfinite < 0:
        raise UsageError(
            f"skip_nonfinite={run.skip_nonfinite} is not a number of steps; type 0 to stop at the first loss that is "
            "not finite, or the number of such steps in a row to skip"
        )
    if run.ema is not None and not 0 < run.ema < 1:
        raise UsageError(
            f"ema={run.ema:g} is not a decay between 0 and 1; type for example ema=0.999, or ema=null for no average"
        )


def _check_combinations(run: Run) -> None:
    if run.cache.drop_unused and run.stage is not Stage.cache:
        raise UsageError(
            "cache.drop_unused=true deletes entries, which only stage=cache does; type stage=cache as well"
        )
    if run.evaluation.patience is not None and run.dataset.validation_fraction == 0:
        raise UsageError(
            "evaluation.patience needs held-out samples; type dataset.validation_fraction=0.15 or another number "
            "above 0"
        )
    _check_texts(run)


def _check_texts(run: Run) -> None:
    """Checks that the dataset has exactly the texts that the model reads besides the caption."""
    needed, present = run.model.text_fields, run.dataset.text_fields
    missing = [f"dataset.{name}" for name in needed if name not in present]
    if missing:
        raise UsageError(
            f"model.keywords=true needs {' and '.join(missing)}, the text that the language model is asked to answer; "
            f"type {missing[0]}='...' with dataset=personalized, whose file in conf/dataset/ names the fields"
        )
    unused = [f"dataset.{name}" for name in present if name not in needed]
    if unused:
        raise UsageError(
            f"{' and '.join(unused)}: nothing reads this unless model.keywords=true; type that, or leave it out"
        )
    if run.sample.preference_weights is not None and not needed:
        raise UsageError(
            "sample.preference_weights compares images with the keywords of the target and the user, which only a run "
            "with model.keywords=true has; leave it out"
        )
    for name, prompts in (("sample.prompts", run.sample.prompts), ("evaluation.prompts", run.evaluation.prompts)):
        if needed and prompts is not None:
            raise UsageError(
                f"{name}: a prompt has no {' and '.join(needed)}, which this model reads; leave {name} out, so that "
                "samples of the dataset are used"
            )


def _check_average(run: Run) -> None:
    if not run.optimizer.averages_weights:
        return
    name = option_name(run.optimizer)
    if run.ema is not None:
        raise UsageError(
            f"ema={run.ema:g}: optimizer={name} averages the weights itself; type ema=null, or optimizer=adamw"
        )
    if option_name(run.lr_scheduler) != "constant":
        raise UsageError(
            f"optimizer={name} averages the weights instead of decaying the learning rate, as "
            f"lr_scheduler={option_name(run.lr_scheduler)} does; type lr_scheduler=constant"
        )


def _check_precision(run: Run) -> None:
    storage, compute = run.precision.storage, run.precision.compute
    if storage in (Storage.bf16, Storage.fp16) and compute is Dtype.float32:
        raise UsageError(
            f"precision={storage.name} stores weights that cannot be multiplied in float32; type precision=fp32, or "
            f"precision.compute={storage.value}"
        )
    if run.precision.float8_products and storage is not Storage.fp8:
        raise UsageError(
            f"precision.float8_products=true multiplies float8 weights, but precision={storage.name} stores none; type "
            "precision=fp8, or leave it out"
        )
    if storage.is_quantized and not run.method.freezes:
        raise UsageError(
            f"precision={storage.name} quantizes frozen weights, but method={option_name(run.method)} freezes none; "
            f"type method=lora, or precision={Storage(compute.value).name}"
        )


def _check_stochastic_rounding(run: Run) -> None:
    if not run.method.stochastic_rounding:
        return
    storage = run.precision.storage
    if storage is not Storage.bf16:
        raise UsageError(
            f"method.master_weights=none rounds updates to bfloat16, but precision={storage.name} is a different type; "
            "type precision=bf16, or method.master_weights=fp32"
        )
    if run.optimizer.updates_jointly:
        raise UsageError(
            f"method.master_weights=none updates one tensor at a time, and optimizer={option_name(run.optimizer)} "
            "needs all of them at once; type optimizer=adamw, or method.master_weights=fp32"
        )


def check_card(run: Run, card: Card) -> None:
    """Checks what a card can do. Capabilities that are None are unknown and rule nothing out."""
    supported = {"bfloat16": card.bfloat16, "float16": card.float16}
    storage, compute = run.precision.storage, run.precision.compute
    unsupported = [dtype for dtype in (storage.value, compute.value) if supported.get(dtype) is False]
    if unsupported:
        instead = next((dtype for dtype, works in supported.items() if works), "float32")
        remedy = (
            f"precision={Storage(instead).name}" if storage.value in unsupported else f"precision.compute={instead}"
        )
        raise UsageError(f"hardware: {card.name} cannot train in {unsupported[0]}; type {remedy}")
    if run.precision.float8_products and card.float8 is False:
        raise UsageError(
            f"precision.float8_products=true: {card.name} cannot multiply float8 numbers; leave it out (precision=fp8 "
            "only stores float8, and works on every card)"
        )
    if storage.needs_bitsandbytes and card.bitsandbytes is False:
        raise UsageError(
            f"precision={storage.name} needs bitsandbytes, which does not run on {card.name}; type precision=fp8 or "
            "precision=int8"
        )
    if run.optimizer.needs_bitsandbytes and card.bitsandbytes is False:
        raise UsageError(
            f"optimizer={option_name(run.optimizer)}: bitsandbytes has no optimizer for {card.name}; type "
            "optimizer=adamw"
        )


def check_sharded(run: Run) -> None:
    """Checks a run whose network is sharded across processes."""
    unsharded = (
        "start the run without accelerate's FSDP, so that each process holds the whole network (launch/gpus.yaml)"
    )
    storage = run.precision.storage
    if storage.needs_bitsandbytes or storage is Storage.native:
        raise UsageError(
            f"precision={storage.name}: weights in this format cannot be sharded; type precision=fp8, or {unsharded}"
        )
    if run.method.reads_weights_outside_forward:
        raise UsageError(
            f"method={option_name(run.method)} reads weights outside of a forward pass, where each process has only "
            f"its shard of them; {unsharded}"
        )
    if not run.method.freezes and not run.optimizer.supports_sharding:
        raise UsageError(
            f"optimizer={option_name(run.optimizer)} needs whole tensors, and each process has only a shard of them; "
            f"type optimizer=adamw, or {unsharded}"
        )
    if run.method.stochastic_rounding:
        raise UsageError(
            "method.master_weights=none rounds whole tensors, and each process has only a shard of them; leave it out, "
            f"or {unsharded}"
        )
    if run.hardware.compile:
        raise UsageError(f"hardware.compile=true does not work with a sharded network; leave it out, or {unsharded}")
    whole = [format.name for format in run.export.formats or () if format in (Format.pipeline, Format.single_file)]
    if whole:
        formats = ",".join(whole)
        raise UsageError(
            f"export.formats: {formats} needs the whole network, which no process has; leave it out, and type "
            f"stage=export run=<id> export.formats=[{formats}] when the run is finished"
        )


def open_device(run: Run) -> torch.device:
    """Returns the device of the run, after checking that it can do what the run needs."""
    device = run.hardware.open()
    check_card(run, detect_card(device))
    return device


def memory_remedies(run: Run) -> list[str]:
    """Returns what to type if there is not enough memory for a single sample. The least costly remedy comes first."""
    storage, adapter = run.precision.storage, run.method.freezes
    remedies = []
    if not run.hardware.gradient_checkpointing:
        remedies.append("hardware.gradient_checkpointing=true (the same result, more slowly)")
    if not adapter and not run.optimizer.needs_bitsandbytes and run.hardware.card.bitsandbytes is not False:
        remedies.append("optimizer=adamw8bit")
    if storage is Storage.fp32 and run.hardware.card.bfloat16 is not False:
        remedies.append("precision=bf16")
    elif adapter and storage in (Storage.bf16, Storage.fp16):
        remedies.append("precision=fp8")
    if not adapter:
        remedies.append("method=lora")
    *smaller, (width, height) = run.dataset.resolutions()
    names = [size_name(size) for size in smaller] or [size_name((max(width // 2, 16), max(height // 2, 16)))]
    remedies.append(f"dataset.resolution={names[0]}" if len(names) == 1 else f"dataset.resolution=[{','.join(names)}]")
    return remedies
