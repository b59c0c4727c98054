"""Measures the images of several networks, and how much the first network differs from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.comparison.record import Measurement
from trainer.core.errors import UsageError
from trainer.evaluation import Evaluation
from trainer.evaluation.intervals import estimate
from trainer.evaluation.metrics import Metric, Pictures, Setup, all_metrics

if TYPE_CHECKING:
    import numpy as np


def chosen_metrics(settings: Evaluation) -> dict[str, Metric]:
    """Returns the metrics of `evaluation.metrics`. Raises errors.UsageError."""
    metrics = all_metrics()
    names = list(metrics) if settings.metrics is None else settings.metrics
    if unknown := [name for name in names if name not in metrics]:
        raise UsageError(f"evaluation.metrics: {unknown[0]} is unknown; type some of {', '.join(metrics)}")
    return {name: metrics[name] for name in names}


def measure(
    metrics: dict[str, Metric], setup: Setup, pictures: Sequence[Pictures]
) -> tuple[list[Measurement], dict[str, str]]:
    """Returns the metrics of each network's pictures, and metric -> reason for those that are left out.

    The pictures of the networks have the same prompts and seeds in the same order.
    """
    measurements, left_out = [], {}
    for name, metric in metrics.items():
        reason = next((text for each in pictures if (text := metric.missing(setup, each))), None)
        if reason is not None:
            left_out[name] = reason
        else:
            measurements.append(_measure(name, metric, setup, pictures))
    return measurements, left_out


def _measure(name: str, metric: Metric, setup: Setup, pictures: Sequence[Pictures]) -> Measurement:
    prompts, count = pictures[0].prompts, metric.resamples
    statistics = [metric.statistic(setup, each) for each in pictures]
    estimates = [estimate(statistic, prompts, count) for statistic in statistics]
    first = statistics[0]
    differences = {}
    for each, other in zip(pictures[1:], statistics[1:], strict=True):

        def difference(indices: np.ndarray, other=other) -> float:
            return first(indices) - other(indices)

        differences[each.name] = estimate(difference, prompts, count)
    model = metric.model(setup)
    notes = {each.name: found for each in pictures if (found := metric.notes(setup, each))}
    return Measurement(
        name,
        metric.title,
        metric.unit,
        metric.better,
        setup.models[model] if model else None,
        {each.name: value for each, value in zip(pictures, estimates, strict=True)},
        differences,
        notes,
    )
