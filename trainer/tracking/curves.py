"""What a run leaves beside its checkpoints for people without MLflow: a table, a summary and a picture, all made from its journal."""

from __future__ import annotations

import csv
import io
import math
from array import array
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core import files
from trainer.tracking import journal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = tuple[array, array]
"""The steps at which something was measured, increasing, and the values, of the same length."""

TRAIN_LOSS = "train/loss"
HELD_OUT_LOSS = "val/loss"
BLUE, ORANGE, GREY, GRID = "#2b6cb0", "#dd6b20", "#4a5568", "#e2e8f0"


def series(folder: Path) -> dict[str, Series]:
    """Each metric in the journal of `folder`, by name."""
    found: dict[str, Series] = {}
    for _, record in journal.read(folder / journal.FILE_NAME):
        if record["kind"] == journal.METRICS:
            for key, value in record["values"].items():
                steps, values = found.setdefault(key, (array("q"), array("d")))
                steps.append(record["step"])
                values.append(value)
    return dict(sorted(found.items()))


def write_metrics_csv(folder: Path) -> Path:
    """Write metrics.csv: a row a step, a column a metric, sorted; empty where it was not measured. Raises errors.StorageError."""
    metrics = series(folder)
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
    """Write summary.json: `steps`, `seconds` (of all attempts), `attempts`, the `final` value of each metric, the `best` of losses and PSNRs.

    `extra` is added, and wins over what is worked out here. Values that are not finite are written as text. Raises errors.StorageError.
    """
    metrics = series(folder)
    seconds, attempts = _time(folder)
    best = {}
    for key, (steps, values) in metrics.items():
        choose = min if "loss" in key else max if "psnr" in key else None
        finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        if finite and choose:
            value, step = choose(finite, key=lambda point: point[0])
            best[key] = {"value": value, "step": step}
    summary = {
        "steps": max((steps[-1] for steps, _ in metrics.values()), default=0),
        "seconds": round(seconds, 1),
        "attempts": attempts,
        "final": {
            key: values[-1] if math.isfinite(values[-1]) else str(values[-1]) for key, (_, values) in metrics.items()
        },
        "best": best,
        **extra,
    }
    files.write_json(folder / "summary.json", summary)
    return folder / "summary.json"


def draw_curves(folder: Path, title: str = "") -> Path:
    """Draw training_curves.png: losses above; learning rate, gradient norm, speed and memory below. Raises errors.StorageError."""
    # No pyplot: it keeps figures and a backend for the whole process, and drawing belongs to this run alone.
    from matplotlib.figure import Figure

    metrics = series(folder)
    figure = Figure(figsize=(11, 7), dpi=120, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.suptitle(title or folder.resolve().name, fontsize=13, color=GREY)
    grid = figure.add_gridspec(2, 3, height_ratios=(3, 2))

    loss = _panel(figure.add_subplot(grid[0, :]), "loss")
    _draw_losses(loss, metrics)
    _draw(_panel(figure.add_subplot(grid[1, 0]), "learning rate"), _matching(metrics, "learning_rate", "/lr"))
    norm = _panel(figure.add_subplot(grid[1, 1]), "gradient norm")
    _draw(norm, _matching(metrics, "grad_norm", "gradient_norm"), smooth=True)
    speed = _panel(figure.add_subplot(grid[1, 2]), "speed and memory")
    speeds, memories = (
        _matching(metrics, "steps_per_second"),
        _matching(metrics, "device_memory_gib") or _matching(metrics, "memory_gib"),
    )
    _draw(speed, speeds, unit="steps/s", smooth=True, empty=not memories)
    if memories:
        memory = _panel(speed.twinx(), "")
        memory.grid(False)
        _draw(
            memory,
            memories,
            color=ORANGE,
            unit=next(iter(memories)).rpartition("/")[2].replace("_", " ").replace("gib", "GiB"),
        )

    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    files.write(folder / "training_curves.png", picture.getvalue())
    return folder / "training_curves.png"


def draw_heat_map(
    path: Path, title: str, across: tuple[str, list[float]], down: tuple[str, list[float]], values: list[list[float]]
) -> Path:
    """Draw `values`, a row for each value of `down` and a column for each of `across`, as a table in colours; NaN stays empty.

    The smallest is framed. Raises errors.StorageError.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    (x, columns), (y, rows) = across, down
    figure = Figure(
        figsize=(2.5 + 1.1 * len(columns), 1.8 + 0.8 * len(rows)), dpi=120, layout="constrained", facecolor="white"
    )
    axes = figure.add_subplot()
    # A large value comes first in reading, as on any axis that grows upwards.
    image = axes.imshow(values, cmap="viridis_r", origin="lower", aspect="auto")
    axes.set_title(title, fontsize=11, color=GREY, loc="left")
    axes.set_xlabel(x, fontsize=9, color=GREY)
    axes.set_ylabel(y, fontsize=9, color=GREY)
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    axes.tick_params(labelsize=9, colors=GREY, length=0)
    axes.spines[:].set_visible(False)
    known = [(value, i, j) for i, row in enumerate(values) for j, value in enumerate(row) if math.isfinite(value)]
    for value, i, j in known:
        dark = image.norm(value) > 0.5
        axes.text(j, i, f"{value:.4g}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
    if known:
        _, i, j = min(known)
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=3, clip_on=False))
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    files.write(path, picture.getvalue())
    return path


def smoothed(values: list[float]) -> list[float]:
    """The mean around each point over about a twentieth of all, one-sided at the ends; of the same length."""
    # Centred, since a running mean lags behind a falling loss and would show a gap to the held-out one that is not there.
    half = len(values) // 40
    sums = [0.0, *accumulate(values)]
    windows = ((max(0, at - half), min(len(values), at + half + 1)) for at in range(len(values)))
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in windows]


def _time(folder: Path) -> tuple[float, int]:
    """Seconds in which the run was at work, pauses between attempts left out, and the number of attempts."""
    seconds, attempts, before = 0.0, 0, None
    for _, record in journal.read(folder / journal.FILE_NAME):
        if record["kind"] == "attempt":
            attempts, before = attempts + 1, None
        if before is not None:
            seconds += max(0.0, record["time"] - before)  # a clock that was set back adds nothing
        before = record["time"]
    return seconds, attempts


def _matching(metrics: dict[str, Series], *words: str) -> dict[str, Series]:
    """The metrics with one of these words in their name."""
    return {key: value for key, value in metrics.items() if any(word in key for word in words)}


def _finite(points: Series) -> tuple[list[int], list[float]]:
    kept = [(step, value) for step, value in zip(*points, strict=True) if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def _panel(axes: Axes, title: str) -> Axes:
    axes.set_title(title, fontsize=10, color=GREY, loc="left")
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(labelsize=8, colors=GREY, length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return axes


def _draw_losses(axes: Axes, metrics: dict[str, Series]) -> None:
    shown: list[float] = []
    steps, values = _finite(metrics.get(TRAIN_LOSS, (array("q"), array("d"))))
    if values:
        means = smoothed(values)
        axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.25)
        axes.plot(
            steps,
            means,
            color=BLUE,
            linewidth=2,
            marker="o" if len(values) == 1 else None,
            label=f"train {means[-1]:.4g} (smoothed)",
        )
        shown += values
    steps, values = _finite(metrics.get(HELD_OUT_LOSS, (array("q"), array("d"))))
    if values:
        best, at = min(zip(values, steps, strict=True))
        axes.plot(
            steps, values, color=ORANGE, linewidth=2, marker="o", markersize=4, label=f"held out {values[-1]:.4g}"
        )
        axes.plot(
            [at],
            [best],
            color=ORANGE,
            marker="o",
            markersize=11,
            fillstyle="none",
            linestyle="none",
            label=f"best {best:.4g} at step {at}",
        )
        shown += values
    if not shown:
        _say_empty(axes)
        return
    # Losses that fall by decades are read on a log scale; otherwise a straight one shows small gaps better.
    if min(shown) > 0 and max(shown) / min(shown) > 20:
        axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=9, color=GREY)
    axes.legend(frameon=False, fontsize=9, labelcolor=GREY)


def _draw(
    axes: Axes, lines: dict[str, Series], color: str = BLUE, unit: str = "", smooth: bool = False, empty: bool = True
) -> None:
    drawn = False
    for number, points in enumerate(lines.values()):
        steps, values = _finite(points)
        if not values:
            continue
        drawn = True
        style = {
            "color": color,
            "linestyle": ("-", "--", ":", "-.")[number % 4],
            "marker": "o" if len(values) == 1 else None,
        }
        if smooth:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
            values = smoothed(values)
        axes.plot(steps, values, linewidth=1.6, **style)
    if drawn and unit:
        axes.set_ylabel(unit, fontsize=8, color=color)
        axes.set_ylim(bottom=0)
    if not drawn and empty:
        _say_empty(axes)


def _say_empty(axes: Axes) -> None:
    axes.text(
        0.5, 0.5, "nothing measured yet", ha="center", va="center", transform=axes.transAxes, fontsize=9, color=GREY
    )
    axes.set_xticks([])
    axes.set_yticks([])
