"""The progress bar of training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from trainer.core.console import refresh_interval

if TYPE_CHECKING:
    from trainer.training.loop import Step


class Progress:
    """Context manager that shows a progress bar on stderr and measures the speed. `hidden` shows nothing."""

    def __init__(self, total_steps: int, start: int, batch_size: int, hidden: bool = False):
        from tqdm import tqdm

        self.batch_size = batch_size
        self.bar = tqdm(
            total=total_steps,
            initial=start,
            desc="training",
            unit="step",
            mininterval=refresh_interval(),
            dynamic_ncols=True,
            disable=hidden,
        )
        self.last_time = time.perf_counter()

    def advance(self, step: Step) -> dict[str, float]:
        """Shows a finished step. Returns its speed as metrics."""
        previous_time, self.last_time = self.last_time, time.perf_counter()
        seconds = self.last_time - previous_time
        self.bar.set_postfix_str(f"loss {step.loss:.4f}, lr {step.lr:.2e}", refresh=False)
        self.bar.update(1)
        return {"perf/steps_per_second": 1 / seconds, "perf/samples_per_second": self.batch_size / seconds}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside the block out of the measured speed."""
        start = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
