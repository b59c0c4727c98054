"""Files in the run folder for people without MLflow: a table, a summary and plots, all made from the journal."""

from __future__ import annotations

import csv
import io
import math
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core import files
from trainer.tracking import journal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[array, array]
"""Steps at which a metric was measured, increasing, and its values, of the same length."""

TRAIN_LOSS = "train/loss"
HELD_OUT_LOSS = "val/loss"
BLUE, ORANGE, GRAY, LIGHT_GRAY = "#2b6cb0", "#dd6b20", "#4a5568", "#e2e8f0"


def read_series(folder: Path) -> dict[str, Series]:
    """Returns each metric in the journal of `folder`, sorted by name."""
    metrics: dict[str, Series] = {}
    for _, record in journal.read_records(folder / journal.FILE_NAME):
        if record["kind"] == journal.METRICS:
            for key, value in record["values"].items():
                steps, values = metrics.setdefault(key, (array("q"), array("d")))
                steps.append(record["step"])
                values.append(value)
    return dict(sorted(metrics.items()))


def write_metrics_csv(folder: Path) -> Path:
    """Writes metrics.csv, one row per step and one column per metric, sorted by name. Raises errors.StorageError."""
    metrics = read_series(folder)
    rows = {step: number for number, step in enumerate(sorted(set().union(*(steps for steps, _ in metrics.values()))))}
    columns = []
    for steps, values in metrics.values():
        column = [""] * len(rows)
        for step, value in zip(steps, values, strict=True):
            column[rows[step]] = repr(value)
        columns.append(column)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", *metrics])
    table.writerows(zip(rows, *columns, strict=True))
    files.write(folder / "metrics.csv", text.getvalue())
    return folder / "metrics.csv"


def write_summary(folder: Path, extra: dict[str, Any]) -> Path:
    """Writes summary.json: `steps`, `seconds` (of all attempts), `attempts`, and the `final` and `best` metrics.

    `best` has losses and PSNRs only. `extra` adds entries, or overrides those above. Values that are not finite are
    written as text. Raises errors.StorageError.
    """
    metrics = read_series(folder)
    seconds, attempts = _working_time(folder)
    best = {}
    for key, (steps, values) in metrics.items():
        choose = min if "loss" in key else max if "psnr" in key else None
        finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        if finite and choose:
            value, step = choose(finite, key=lambda point: point[0])
            best[key] = {"value": value, "step": step}
    final = {key: values[-1] for key, (_, values) in metrics.items()}
    summary = {
        "steps": max((steps[-1] for steps, _ in metrics.values()), default=0),
        "seconds": round(seconds, 1),
        "attempts": attempts,
        "final": {key: value if math.isfinite(value) else str(value) for key, value in final.items()},
        "best": best,
        **extra,
    }
    files.write_json(folder / "summary.json", summary)
    return folder / "summary.json"


def draw_curves(folder: Path, title: str = "") -> Path:
    """Draws training_curves.png: losses above, learning rate, gradient norm, speed and memory below.

    Raises errors.StorageError.
    """
    figure = _new_figure(11, 7, padding=0.12)
    figure.suptitle(title or folder.resolve().name, fontsize=13, color=GRAY)
    grid = figure.add_gridspec(2, 3, height_ratios=(3, 2))
    metrics = read_series(folder)

    _draw_losses(_format_panel(figure.add_subplot(grid[0, :]), "loss"), metrics)
    rate = _format_panel(figure.add_subplot(grid[1, 0]), "learning rate")
    _draw_lines(rate, _matching(metrics, "learning_rate", "/lr"))
    norm = _format_panel(figure.add_subplot(grid[1, 1]), "gradient norm")
    _draw_lines(norm, _matching(metrics, "grad_norm", "gradient_norm"), smooth=True)
    speed = _format_panel(figure.add_subplot(grid[1, 2]), "speed and memory")
    speeds = _matching(metrics, "steps_per_second")
    memories = _matching(metrics, "device_memory_gib") or _matching(metrics, "memory_gib")
    _draw_lines(speed, speeds, unit="steps/s", smooth=True, mark_empty=not memories)
    if memories:
        memory = _format_panel(speed.twinx(), "")
        memory.grid(False)
        unit = next(iter(memories)).rpartition("/")[2].replace("_", " ").replace("gib", "GiB")
        _draw_lines(memory, memories, color=ORANGE, unit=unit)
    return _save(figure, folder / "training_curves.png")


def draw_heat_map(
    path: Path, title: str, across: tuple[str, list[float]], down: tuple[str, list[float]], values: list[list[float]]
) -> Path:
    """Draws `values`, of which lower ones are better, as a colored table and frames the best one.

    Cells with NaN are empty.

    Raises errors.StorageError.

    Args:
        path: PNG file to write.
        title: What the values are, for the text above the table.
        across: Label and values of the columns.
        down: Label and values of the rows, the last one on top.
        values: `values[row][column]`.
    """
    from matplotlib.patches import Rectangle

    (x_label, columns), (y_label, rows) = across, down
    figure = _new_figure(3.5 + 1.1 * len(columns), 1.8 + 0.8 * len(rows))
    axes = figure.add_subplot()
    # As on any axis that points upwards, larger values are above.
    image = axes.imshow(values, cmap="viridis_r", origin="lower", aspect="auto")
    axes.set_title(f"{title} (lower is better)", fontsize=11, color=GRAY, loc="left")
    axes.set_xlabel(x_label, fontsize=9, color=GRAY)
    axes.set_ylabel(y_label, fontsize=9, color=GRAY)
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    axes.tick_params(labelsize=9, colors=GRAY, length=0)
    axes.spines[:].set_visible(False)
    cells = [(value, i, j) for i, row in enumerate(values) for j, value in enumerate(row) if math.isfinite(value)]
    if cells:
        (lowest, i, j), (highest, _, _) = min(cells), max(cells)
        scale = figure.colorbar(image, ax=axes)
        scale.set_label("lower is better", fontsize=9, color=GRAY)
        scale.ax.tick_params(labelsize=8, colors=GRAY, length=0)
        scale.outline.set_visible(False)
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=3, clip_on=False))
        for value, i, j in cells:
            color = "white" if value > (lowest + highest) / 2 else "black"  # on a dark or light background
            axes.text(j, i, f"{value:.4g}", ha="center", va="center", fontsize=9, color=color)
    return _save(figure, path)


def smooth_values(values: Sequence[float]) -> list[float]:
    """Returns a moving average over about a twentieth of all values, with shorter windows at both ends."""
    # The windows are centered, since a trailing mean lags behind a falling loss and would show a false gap to the
    # held-out loss.
    half = len(values) // 40
    sums = [0.0, *accumulate(values)]
    windows = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in windows]


def _working_time(folder: Path) -> tuple[float, int]:
    """Returns the seconds of all attempts together, without the pauses between them, and the number of attempts."""
    seconds, attempts, previous = 0.0, 0, None
    for _, record in journal.read_records(folder / journal.FILE_NAME):
        if record["kind"] == "attempt":
            attempts, previous = attempts + 1, None
        if previous is not None:
            seconds += max(0.0, record["time"] - previous)  # a clock that was set back adds nothing
        previous = record["time"]
    return seconds, attempts


def _matching(metrics: dict[str, Series], *words: str) -> dict[str, Series]:
    """Returns the metrics with one of the words in their name."""
    return {key: value for key, value in metrics.items() if any(word in key for word in words)}


def _finite(series: Series | None) -> tuple[list[int], list[float]]:
    """Returns the points with finite values as steps and values; empty lists if there is no such metric."""
    points = [(step, value) for step, value in zip(*series, strict=True) if math.isfinite(value)] if series else []
    return [step for step, _ in points], [value for _, value in points]


def _new_figure(width: float, height: float, padding: float = 0.04) -> Figure:
    """Returns an empty figure; all lengths are in inches."""
    # pyplot would keep figures and a backend for the whole process.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=padding, h_pad=padding)
    return Figure(figsize=(width, height), dpi=120, layout=layout, facecolor="white")


def _save(figure: Figure, path: Path) -> Path:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    files.write(path, data.getvalue())
    return path


def _format_panel(axes: Axes, title: str) -> Axes:
    axes.set_title(title, fontsize=10, color=GRAY, loc="left")
    axes.grid(True, color=LIGHT_GRAY, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT_GRAY)
    axes.tick_params(labelsize=8, colors=GRAY, length=0)
    axes.locator_params(axis="x", integer=True)
    return axes


def _draw_losses(axes: Axes, metrics: dict[str, Series]) -> None:
    steps, train_losses = _finite(metrics.get(TRAIN_LOSS))
    if train_losses:
        means = smooth_values(train_losses)
        marker = "o" if len(means) == 1 else None
        axes.plot(steps, train_losses, color=BLUE, linewidth=0.8, alpha=0.25)
        axes.plot(steps, means, color=BLUE, linewidth=2, marker=marker, label=f"train {means[-1]:.4g} (smoothed)")
    steps, held_out_losses = _finite(metrics.get(HELD_OUT_LOSS))
    if held_out_losses:
        label = f"held out {held_out_losses[-1]:.4g}"
        axes.plot(steps, held_out_losses, color=ORANGE, linewidth=2, marker="o", markersize=4, label=label)
        best, step = min(zip(held_out_losses, steps, strict=True))
        label = f"best {best:.4g} at step {step}"
        axes.plot([step], [best], "o", color=ORANGE, markersize=11, fillstyle="none", label=label)
    losses = train_losses + held_out_losses
    if not losses:
        _mark_empty(axes)
        return
    # A logarithmic scale suits losses that fall by orders of magnitude; otherwise, a linear one shows small gaps.
    if min(losses) > 0 and max(losses) / min(losses) > 20:
        axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=9, color=GRAY)
    axes.legend(frameon=False, fontsize=9, labelcolor=GRAY)


def _draw_lines(
    axes: Axes,
    metrics: dict[str, Series],
    color: str = BLUE,
    unit: str = "",
    smooth: bool = False,
    mark_empty: bool = True,
) -> None:
    """Draws one line per metric, each in its own style; `smooth` draws a moving average above the pale raw values."""
    is_empty = True
    for number, series in enumerate(metrics.values()):
        steps, values = _finite(series)
        if not values:
            continue
        is_empty = False
        if smooth:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
            values = smooth_values(values)
        style, marker = ("-", "--", ":", "-.")[number % 4], "o" if len(values) == 1 else None
        axes.plot(steps, values, color=color, linewidth=1.6, linestyle=style, marker=marker)
    if unit and not is_empty:
        axes.set_ylabel(unit, fontsize=8, color=color)
        axes.set_ylim(bottom=0)
    if mark_empty and is_empty:
        _mark_empty(axes)


def _mark_empty(axes: Axes) -> None:
    text = "nothing measured yet"
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, fontsize=9, color=GRAY)
    axes.set_xticks([])
    axes.set_yticks([])
