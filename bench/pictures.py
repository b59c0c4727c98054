"""The README's pictures: the default run beside others that differ in rank and learning rate, and what the base can do without any.

`make pictures` trains each, writes docs/*.png and prints the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer import config
from trainer.dataset import demo, strip
from trainer.evaluation.metrics import psnr
from trainer.tracking.journal import read
from trainer.training.data import drawn, prepare

if TYPE_CHECKING:
    from trainer.dataset.view import TransformedSample

DOCS = Path(__file__).parents[1] / "docs"
RUNS = {
    "rank 1, lr 1e-4": ["method.rank=1", "optimizer.lr=1e-4"],
    "rank 16, lr 1e-4": ["optimizer.lr=1e-4"],
    "rank 1, lr 2e-3": ["method.rank=1"],
    "rank 16, lr 2e-3": [],
}
DEFAULT = "rank 16, lr 2e-3"
COLOURS = dict(zip(RUNS, ("#a0aec0", "#319795", "#2b6cb0", "#dd6b20"), strict=True))
SCENES = 4


def trained(out: Path, *overrides: str) -> Path:
    """Train (or find finished) the run with these settings, and return its folder."""
    command = [sys.executable, "-m", "trainer", f"out={out}", "tracking=none", *overrides]
    subprocess.run(command, check=True)
    checked = subprocess.run([*command, "stage=check"], check=True, capture_output=True, text=True).stdout
    return out / checked.split()[1]


def held_out(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """The steps at which `val/<name>` was measured, and the values."""
    values = [(record["step"], record["values"]) for _, record in read(folder / "journal.jsonl") if "values" in record]
    points = [(step, found[f"val/{name}"]) for step, found in values if f"val/{name}" in found]
    return [step for step, _ in points], [value for _, value in points]


def drawings(folder: Path, step: int, count: int) -> list[tuple[TransformedSample, np.ndarray]]:
    """The first held-out samples of a run and what it drew of them at this step."""
    run = config.from_yaml(folder / "config.yaml")
    views = [view for view, _ in drawn(run, prepare(run))[:count]]
    return [
        (view, strip.load(folder / "pictures" / f"step-{step:08d}" / f"{i}.png")) for i, view in enumerate(views, 1)
    ]


def grid(path: Path, columns: dict[str, list[np.ndarray]], rows: list[str] | None = None) -> None:
    """Pictures in columns under their titles; `rows` stand at the left."""
    tall = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.75 * len(columns) + 0.4 * bool(rows), 1.72 * tall + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    for column, (title, pictures) in zip(
        figure.subplots(tall, len(columns), squeeze=False).T, columns.items(), strict=True
    ):
        column[0].set_title(title, fontsize=9.5)
        for axes, picture in zip(column, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, name in zip(figure.axes[:: len(columns)] if rows else (), rows or (), strict=True):
        axes.set_ylabel(name, fontsize=9.5)
    figure.savefig(path)


def curves(path: Path, folders: dict[str, Path]) -> None:
    """Held-out loss and PSNR of the runs over steps, each line with its name at its end."""
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, name, title in (
        (left, "loss", "held-out loss (lower is better)"),
        (right, "psnr", "PSNR of 32 drawn pictures, dB (higher is better)"),
    ):
        ends = []
        for run, folder in folders.items():
            steps, values = held_out(folder, name)
            axes.plot(steps, values, marker=".", color=COLOURS[run])
            ends.append((values[-1], run, f"{run}: {values[-1]:.{2 if name == 'loss' else 1}f}"))
        axes.set_title(title, fontsize=10.5, loc="left")
        axes.set(xlabel="step", xlim=(0, steps[-1] * 1.42), xticks=steps[::2])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "loss":
            axes.set_yscale("log")
            axes.set_yticks((0.3, 0.5, 1, 2, 4), labels=("0.3", "0.5", "1", "2", "4"))
            axes.minorticks_off()
        for i, (value, run, text) in enumerate(sorted(ends)):
            # Names of lines that end at the same height are moved apart.
            below = sorted(ends)[i - 1][0] if i else -np.inf
            offset = 11 if i and abs(value - below) < 0.03 * np.ptp(axes.get_ylim()) else 0
            axes.annotate(
                text,
                (steps[-1], value),
                (6, offset),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=COLOURS[run],
            )
    figure.savefig(path)


def base(out: Path) -> dict[str, dict[str, float]]:
    """Draw what the model does without training, one scene of each kind of edit that it knows, and measure 32 of each.

    `psnr` and `control_psnr` are medians, of the drawn and of the unedited picture against the target; `right` is the share of
    pictures in which what should have changed is nearer to the target than to the control.
    """
    columns, figures = {}, {}
    for edit in demo.BASE_EDITS:
        folder = trained(out, f"dataset.edits=[{edit}]", "dataset.pairs=1", "steps=1", "batch=1", "evaluation.shown=32")
        found = []
        for i, (view, picture) in enumerate(drawings(folder, 0, 32)):
            control, target = view.control_pixels()[0].astype(float), view.pixels().astype(float)
            changes = np.abs(target - control).sum(-1) > 30
            right = np.square(picture - target)[changes].mean() < np.square(picture - control)[changes].mean()
            found.append((psnr(picture, target), psnr(control, target), right))
            if i == 0:
                columns[view.caption] = [view.control_pixels()[0], picture, view.pixels()]
        drawn_, unedited, rights = zip(*found, strict=True)
        figures[edit] = {
            "control_psnr": statistics.median(unedited),
            "psnr": statistics.median(drawn_),
            "right": sum(rights) / len(rights),
        }
    grid(DOCS / "base.png", columns, ["control", "drawn", "target"])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"))
    out = parser.parse_args().out
    DOCS.mkdir(exist_ok=True)
    figures = {"base": base(out)}
    folders = {
        name: trained(out, f"evaluation.shown={SCENES}", "evaluation.every=25", *overrides)
        for name, overrides in RUNS.items()
    }
    steps, before = held_out(folders[DEFAULT], "psnr")
    views = [view for view, _ in drawings(folders[DEFAULT], 0, SCENES)]
    columns = {"control": [view.control_pixels()[0] for view in views]}
    columns[f"before training\n{before[0]:.1f} dB"] = [picture for _, picture in drawings(folders[DEFAULT], 0, SCENES)]
    for name, folder in folders.items():
        title = f"{name}{' (default)' if name == DEFAULT else ''}\n{held_out(folder, 'psnr')[1][-1]:.1f} dB"
        columns[title] = [picture for _, picture in drawings(folder, steps[-1], SCENES)]
    grid(DOCS / "default_run.png", columns | {"target": [view.pixels() for view in views]})
    curves(DOCS / "rank_and_rate.png", folders)
    figures["before training"] = {name: held_out(folders[DEFAULT], name)[1][0] for name in ("loss", "psnr")}
    figures |= {
        run: {name: held_out(folder, name)[1][-1] for name in ("loss", "psnr")} for run, folder in folders.items()
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
