"""Warnings about the course of a run, each with the usual remedy as a setting to type.

The default limits of gap and memory are those of a published guide to fine-tuning.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from trainer.config.rules import memory_remedies
from trainer.config.schema import Run
from trainer.tracking.journal import METRICS

STEPS = 20
"""Number of steps over which values of single steps are averaged."""
LOSS, GRAD_NORM, SPEED = "train/loss", "train/grad_norm", "perf/steps_per_second"
HELD_OUT_LOSS = "val/loss"


class Alert(NamedTuple):
    """A warning. Each kind is given once in a run."""

    kind: str
    text: str


class Alerts:
    """Watches the values that a run logs.

    Args:
        run: The run; `run.alerts` has the thresholds.
        total_steps: Number of steps of the run.
        memory_gib: Memory of the device.
        records: The journal of earlier attempts.
    """

    def __init__(self, run: Run, total_steps: int, memory_gib: float, records: Iterable[dict[str, Any]] = ()):
        self.run, self.limits, self.total_steps, self.memory_gib = run, run.alerts, total_steps, memory_gib
        self._given: set[str] = set()
        """Kinds of alerts that were given."""
        self._recent: dict[str, list[float]] = {LOSS: [], GRAD_NORM: [], SPEED: []}
        """The last values of each measurement."""
        self._losses: list[float] = []
        """Training losses since the last evaluation."""
        self._best_speed = 0.0
        self._first_held_out: float | None = None
        for record in records:
            if record["kind"] == METRICS and self._first_held_out is None:
                self._first_held_out = record["values"].get(HELD_OUT_LOSS)
            elif record["kind"] == "warning" and "alert" in record:
                self._given.add(record["alert"])

    def after_step(self, step: int, values: Mapping[str, float]) -> Iterator[Alert]:
        """Yields new alerts about the values that were logged after a step."""
        if math.isfinite(values[LOSS]):
            self._losses.append(values[LOSS])
        for name, recent in self._recent.items():
            if name in values:
                recent.append(values[name])
                del recent[:-STEPS]
        checks = (self._check_grad_norm(step), self._check_speed(step), self._check_memory(step, values))
        yield from self._new(checks)

    def after_evaluation(self, step: int, loss: float | None, best: float | None) -> Iterator[Alert]:
        """Yields new alerts about a held-out loss and the lowest one so far."""
        losses, self._losses = self._losses, []
        if loss is None or best is None or not math.isfinite(loss):
            return
        if self._first_held_out is None:
            self._first_held_out = loss
        checks = (
            self._check_gap(step, loss, losses),
            self._check_rise(step, loss, best),
            self._check_standstill(step, loss, best),
        )
        yield from self._new(checks)

    def _new(self, alerts: tuple[Alert | None, ...]) -> Iterator[Alert]:
        for alert in alerts:
            if alert is not None and alert.kind not in self._given:
                self._given.add(alert.kind)
                yield alert

    def _mean(self, name: str) -> float | None:
        """Returns the mean of the last `STEPS` values; None before there are so many."""
        recent = self._recent[name]
        return statistics.fmean(recent) if len(recent) == STEPS else None

    def _check_grad_norm(self, step: int) -> Alert | None:
        mean = self._mean(GRAD_NORM)
        if self.limits.grad_norm is None or mean is None or mean <= self.limits.grad_norm:
            return None
        return Alert(
            "grad_norm",
            f"At step {step} the gradient norm is {mean:.1f} on average, above {self.limits.grad_norm:g}; clipping to "
            f"max_grad_norm={self.run.max_grad_norm:g} decides the size of each update. A lower optimizer.lr or a "
            "longer lr_scheduler.warmup usually helps.",
        )

    def _check_speed(self, step: int) -> Alert | None:
        mean = self._mean(SPEED)
        if self.limits.slowdown is None or mean is None:
            return None
        self._best_speed = max(self._best_speed, mean)
        if mean >= self.limits.slowdown * self._best_speed:
            return None
        return Alert(
            "slowdown",
            f"At step {step} the run makes {mean:.3g} steps per second, after {self._best_speed:.3g} before. Another "
            "program may use the same device, memory may be swapped, or the disk of the cache may be slow "
            "(cache.path, hardware.workers).",
        )

    def _check_memory(self, step: int, values: Mapping[str, float]) -> Alert | None:
        used = values.get("system/device_memory_peak_gib", values.get("system/memory_gib", 0.0))
        if self.limits.memory is None or used <= self.limits.memory * self.memory_gib:
            return None
        return Alert(
            "memory",
            f"At step {step} the run has used {used:.1f} of {self.memory_gib:.1f} GiB of memory. If it runs out: "
            f"{'; '.join(memory_remedies(self.run))}.",
        )

    def _check_gap(self, step: int, loss: float, losses: list[float]) -> Alert | None:
        if self.limits.gap is None or len(losses) < STEPS:
            return None
        mean = statistics.fmean(losses)
        # Training losses are noisy: the gap must be larger than the limit by more than chance.
        noise = 2 * statistics.stdev(losses) / math.sqrt(len(losses))
        if loss - mean <= self.limits.gap + noise:
            return None
        return Alert(
            "gap",
            f"At step {step} the held-out loss {loss:.4f} is {loss - mean:.4f} above the training loss: the model "
            "learns its samples by heart. More samples help most; else fewer steps (evaluation.patience=3 ends the run "
            "by itself), a lower method.rank, or method.dropout=0.1.",
        )

    def _check_rise(self, step: int, loss: float, best: float) -> Alert | None:
        if self.limits.rise is None or loss <= (1 + self.limits.rise) * best:
            return None
        return Alert(
            "rise",
            f"At step {step} the held-out loss {loss:.4f} has risen above its lowest value {best:.4f}. The checkpoint "
            "of that value is kept and exported. A lower optimizer.lr, or evaluation.patience=3, which ends such a run "
            "by itself, usually helps.",
        )

    def _check_standstill(self, step: int, loss: float, best: float) -> Alert | None:
        first = self._first_held_out
        if self.limits.standstill is None or first is None or step < self.total_steps / 4 or step < STEPS:
            return None
        if best < (1 - self.limits.standstill) * first or loss > (1 + self.limits.standstill) * first:
            return None
        lr = self.run.optimizer.lr
        advice = f"optimizer.lr={10 * lr:g}" if lr else "a higher optimizer.lr"
        return Alert(
            "standstill",
            f"After {step} of {self.total_steps} steps the held-out loss is still {best:.4f}, as before training: at "
            f"this learning rate nothing moves. Type {advice}, or sweep=learning_rate to try several.",
        )
