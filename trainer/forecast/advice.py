"""What to type if a run does not fit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from trainer.config.compose import compose_config, to_run
from trainer.config.rules import check
from trainer.config.schema import Run
from trainer.core.dtypes import Dtype
from trainer.core.errors import UsageError
from trainer.dataset import size_name
from trainer.dataset.transform import build_transform
from trainer.forecast import GIB, Forecast
from trainer.forecast.predict import try_forecast
from trainer.forecast.table import verdict
from trainer.method.adapter import Adapter
from trainer.precision import Storage
from trainer.training.data import TrainingData

PRECISIONS = {Storage.fp32: ("bf16", "fp8", "nf4"), Storage.bf16: ("fp8", "nf4"), Storage.fp16: ("fp8", "nf4")}
"""Options of `precision` with smaller weights, by present storage; None of them for others but nf4."""
MAX_SECONDS = 60.0
"""CPU time after which no further change is tried."""
MAX_FORECASTS = 3
"""Largest number of changes that are tried alone."""
ONLY_CACHING = "stage=cache hardware=cpu first, in a command of its own"
"""Encodes where there is memory; the cache is the same on every device."""


def check_fits(run: Run, data: TrainingData, found: Forecast) -> None:
    """Raises errors.UsageError, which says what to type, if the forecast of a run exceeds the memory of its card."""
    if found.fits is not False:
        return
    remedies = [f"{text} ({fits.peak / GIB:.1f} GiB)" for text, fits in fitting_changes(run, data, found)]
    if found.fits_after_caching:
        remedies.insert(0, ONLY_CACHING)
    several = ", ".join(text for text, _, _ in changes(run, found))
    remedy = "; or ".join(remedies) or (
        f"a hardware profile with more memory, or several of {several}: no change that was tried is enough"
    )
    raise UsageError(f"This run does not fit: {verdict(found)}. Type {remedy}.")


def fitting_changes(run: Run, data: TrainingData, found: Forecast) -> list[tuple[str, Forecast]]:
    """Returns the changes that make a run fit, each with its forecast, those that cost least first.

    At most `MAX_FORECASTS` changes are tried alone, because each forecast takes seconds. If none of them is enough, the
    result is a combination: all changes up to the first that makes the run fit, found by bisection. After
    `MAX_SECONDS` it is what has been found so far.
    """
    end = time.process_time() + MAX_SECONDS
    candidates = list(changes(run, found))
    possible = [
        (text, changed)
        for text, change, parts in candidates
        if _may_fit(found, parts) and (changed := _changed(run, change))
    ]
    fitting = []
    for text, changed in possible[:MAX_FORECASTS]:
        if time.process_time() < end and (alone := _forecast(changed, data)) and alone.fits:
            fitting.append((text, alone))
    return fitting or _fitting_combination(run, data, found, candidates, end)


def _fitting_combination(
    run: Run, data: TrainingData, found: Forecast, candidates: list[tuple[str, dict[str, Any], set[str]]], end: float
) -> list[tuple[str, Forecast]]:
    """Returns the shortest combination that fits of the first candidates, with its forecast; [] if there is none.

    `end` is the CPU time of this process after which no further combination is tried.
    """
    combinations: list[tuple[str, Run]] = []
    together: dict[str, Any] = {}
    texts: dict[str, str] = {}
    smaller: set[str] = set()
    for text, change, parts in candidates:
        changed = _changed(run, together | change)
        if changed is None:
            continue
        together, smaller = together | change, smaller | parts
        texts[text.partition("=")[0]] = text
        if _may_fit(found, smaller):
            combinations.append((" ".join(texts.values()), changed))
    best: list[tuple[str, Forecast]] = []
    low, high = 0, len(combinations) - 1
    middle = high  # first whether all changes together are enough
    while low <= high and time.process_time() < end:
        text, changed = combinations[middle]
        result = _forecast(changed, data)
        if result and result.fits:
            best, high = [(text, result)], middle - 1
        else:
            low = middle + 1
        middle = (low + high) // 2
    return best


def _may_fit(found: Forecast, parts: set[str]) -> bool:
    """Returns whether a run might fit if these parts of its memory took none. It saves a forecast if not."""
    assert found.available is not None
    left = [memory.total - sum(getattr(memory, part) for part in parts) for memory in found.memory.values()]
    return max(left) <= found.available


def changes(run: Run, found: Forecast) -> Iterator[tuple[str, dict[str, Any], set[str]]]:
    """Yields what may save memory, those that cost least first: what to type, the changed fields of the run, and the
    parts of the memory (fields of `Memory`) that may shrink.
    """
    inside, trained = {"activations", "work_space"}, {"trained", "gradients", "optimizer"}
    hardware, method, dataset = run.hardware, run.method, run.dataset
    if not hardware.gradient_checkpointing:
        hardware = replace(hardware, gradient_checkpointing=True)
        yield "hardware.gradient_checkpointing=true", {"hardware": hardware}, inside
    if found.micro_batch > 1:
        yield "hardware.micro_batch=1", {"hardware": replace(hardware, micro_batch=1)}, inside
    if not run.optimizer.needs_bitsandbytes:
        optimizer = replace(_option("optimizer", "adamw8bit"), lr=run.optimizer.lr)
        yield "optimizer=adamw8bit", {"optimizer": optimizer}, {"optimizer", "work_space"}
    for name in PRECISIONS.get(run.precision.storage, ("nf4",)):
        text, precision = f"precision={name}", _option("precision", name)
        if hardware.card.bfloat16 is False and name != "bf16":
            text, precision = f"{text} precision.compute=float16", replace(precision, compute=Dtype.float16)
        yield text, {"precision": precision}, inside | {"weights"}
    if isinstance(method, Adapter) and method.rank > 8:
        # alpha / rank, the scale of the update, stays the same.
        assert method.alpha is not None
        smaller = replace(method, rank=8, alpha=method.alpha * 8 / method.rank)
        yield "method.rank=8", {"method": smaller}, inside | trained
    elif not method.freezes:
        lora = _option("method", "lora").resolve(run.model.target_modules)
        yield "method=lora", {"method": lora}, inside | trained
    size = dataset.size()
    assert size is not None, "the run is resolved"
    if run.evaluation.images and found.largest == "drawing":
        yield "evaluation.images=0", {"evaluation": replace(run.evaluation, images=0)}, inside | {"encoders"}
    half = size_name((max(size[0] // 2, 16), max(size[1] // 2, 16)))
    yield f"dataset.resolution={half}", {"dataset": replace(dataset, resolution=half)}, inside


def _option(group: str, name: str) -> Any:
    """Returns the settings of an option of a config group."""
    return getattr(to_run(compose_config([f"{group}={name}"])), group)


def _changed(run: Run, change: dict[str, Any]) -> Run | None:
    """Returns a run with other settings; None if they contradict each other."""
    run = replace(run, **change)
    try:
        check(run)
    except UsageError:
        return None
    return run


def _forecast(run: Run, data: TrainingData) -> Forecast | None:
    data = replace(data, transform=build_transform(run.dataset, run.model.size_multiple))
    # A change that cannot be forecast is not proposed.
    return try_forecast(run, data, lambda text: None)
