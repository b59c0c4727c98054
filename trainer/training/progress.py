"""The progress bar of training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from trainer.core.bars import ProgressBar

if TYPE_CHECKING:
    from trainer.training.loop import Step

RECENT = 50
"""Number of steps whose mean speed is shown."""


class Progress:
    """Context manager that shows a progress bar on stderr and measures the speed. `hidden` shows nothing."""

    def __init__(self, total_steps: int, start: int, batch_size: int, hidden: bool = False):
        self.total_steps, self.batch_size = total_steps, batch_size
        self.bar = ProgressBar(
            total=total_steps,
            initial=start,
            desc="training",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            disable=hidden,
        )
        self.recent_seconds: deque[float] = deque(maxlen=RECENT)
        """Seconds of the last steps. The first step does not count: it compiles, and waits for the first batch."""
        self.first_step: tuple[int, float] | None = None
        """Number of the first step, and the time at its end."""
        self.last_time = time.perf_counter()

    def advance(self, step: Step) -> dict[str, float]:
        """Shows a finished step. Returns its speed as metrics."""
        now = time.perf_counter()
        previous_time, self.last_time = self.last_time, now
        seconds = now - previous_time
        texts = [f"loss {step.loss:.4f}", f"lr {step.lr:.2e}"]
        if self.first_step is None:
            self.first_step = step.number, now
        else:
            self.recent_seconds.append(seconds)
            first_number, first_time = self.first_step
            # Evaluations and saves count here: they will take time in the future, too.
            seconds_left = (self.total_steps - step.number) * (now - first_time) / (step.number - first_number)
            mean = sum(self.recent_seconds) / len(self.recent_seconds)
            speed = f"{1 / mean:.2f} step/s" if mean < 1 else f"{mean:.2f} s/step"
            texts = [f"{ProgressBar.format_interval(seconds_left)} left", speed, *texts]
        self.bar.set_postfix_str(", ".join(texts), refresh=False)
        self.bar.update(1)
        return {"perf/steps_per_second": 1 / seconds, "perf/samples_per_second": self.batch_size / seconds}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside the block does not count for the speed."""
        start = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - start

    @contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Shows on a terminal what the run does instead of training, such as "evaluating", inside the block."""
        self.bar.set_description(name, refresh=self.bar.overwrites)
        try:
            yield
        finally:
            # Drawn with the next message or step.
            self.bar.set_description("training", refresh=False)

    def close(self) -> None:
        """Draws the bar for the last time: what is printed from now on follows it."""
        self.bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
