"""The forecast as text."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.forecast import GIB, Forecast

PARTS = {
    "weights": "weights",
    "trained": "trained",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "encoders": "encoders",
    "activations": "activations",
    "work_space": "work space",
    "context": "context",
}
"""Fields of `Memory` -> heads of columns."""


def table(forecast: Forecast) -> Iterator[str]:
    """Yields the lines of the forecast. Memory is in GiB."""
    yield "forecast, peak memory in GiB"
    yield f"  {'':<11}{''.join(f'{head:>12}' for head in PARTS.values())}{'total':>12}"
    for phase, memory in forecast.memory.items():
        values = [getattr(memory, part) for part in PARTS] + [memory.total]
        yield f"  {phase:<11}{''.join(f'{value / GIB:>12.2f}' if value else f'{chr(45):>12}' for value in values)}"
    yield f"  {verdict(forecast)}"
    yield f"  {time_text(forecast)}"
    disk = forecast.disk
    yield (
        f"  disk: cache {size(disk.cache)} to add, checkpoints {size(disk.checkpoints)}, exports {size(disk.exports)}"
    )


def summary(forecast: Forecast) -> str:
    """Returns the most important figures in one line."""
    return f"{verdict(forecast)}; {time_text(forecast)}"


def verdict(forecast: Forecast) -> str:
    """Returns whether the run fits."""
    peak = f"{forecast.peak / GIB:.1f} GiB ({forecast.largest})"
    if forecast.available is None:
        return f"peak {peak}; the memory of {forecast.card} is unknown"
    verb = "fits into" if forecast.fits else "does not fit into"
    return f"peak {peak} {verb} {forecast.available / GIB:.1f} GiB of {forecast.card}"


def time_text(forecast: Forecast) -> str:
    """Returns what a step computes, and at least how long it and the run take."""
    time = forecast.time
    batches = f"{forecast.micro_batches} x {forecast.micro_batch} sample(s)"
    text = f"step: {time.step_flops / 1e12:.3g} TFLOP for {batches}"
    if time.step_seconds is None or time.run_seconds is None or time.evaluation_seconds is None:
        return f"{text}; the rates of {forecast.card} are unknown, so the time is, too"
    return (
        f"{text}, at least {duration(time.step_seconds)} at the peak rates of {forecast.card}; run: at least "
        f"{duration(time.run_seconds)}, {duration(time.evaluation_seconds)} of them for evaluations"
    )


def duration(seconds: float) -> str:
    """Returns a time with two or three digits and its unit."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"


def size(count: int) -> str:
    """Returns a number of bytes in GiB."""
    return f"{count / GIB:.2f} GiB"
