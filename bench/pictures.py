"""Creates the images in the README: runs with several ranks and learning rates, and the abilities of the base model.

`make pictures` trains the runs, writes docs/*.png and prints the measurements. `python -m bench.pictures --sweep-page`
makes docs/sweep.png only, a screenshot of a sweep in MLflow. It needs selenium (`pip install -c constraints.txt
'.[browser]'`) and `apt-get install chromium chromium-driver`.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from trainer.config.compose import read_run
from trainer.dataset import demo_world, image_grid
from trainer.evaluation.metrics.psnr import psnr
from trainer.tracking.journal import read_records
from trainer.training.data import prepare, samples_to_generate

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample

DOCS = Path(__file__).parents[1] / "docs"
RUNS = {
    "rank 1, lr 1e-4": ["method.rank=1", "optimizer.lr=1e-4"],
    "rank 16, lr 1e-4": ["optimizer.lr=1e-4"],
    "rank 1, lr 2e-3": ["method.rank=1"],
    "rank 16, lr 2e-3": [],
}
DEFAULT = "rank 16, lr 2e-3"
COLORS = dict(zip(RUNS, ("#a0aec0", "#319795", "#2b6cb0", "#dd6b20"), strict=True))
SCENES = 4
"""Number of held-out samples whose images are shown."""


def train(out: Path, *overrides: str) -> Path:
    """Trains a run with these settings, unless it is finished, and returns its folder."""
    command = [sys.executable, "-m", "trainer", f"out={out}", "tracking=none", *overrides]
    subprocess.run(command, check=True)
    report = subprocess.run([*command, "stage=check"], check=True, capture_output=True, text=True).stdout
    return out / report.split()[1]


def read_metric(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Returns the steps at which `val/<name>` was measured, and the values."""
    values = [
        (record["step"], record["values"]) for _, record in read_records(folder / "journal.jsonl") if "values" in record
    ]
    points = [(step, found[f"val/{name}"]) for step, found in values if f"val/{name}" in found]
    return [step for step, _ in points], [value for _, value in points]


def generated_images(folder: Path, step: int, count: int) -> list[tuple[TransformedSample, np.ndarray]]:
    """Returns the first held-out samples of a run and the images that it generated for them at this step."""
    run = read_run(folder / "config.yaml")
    samples = [sample for sample, _ in samples_to_generate(run, prepare(run))[:count]]
    return [
        (sample, image_grid.load_png(folder / "pictures" / f"step-{step:08d}" / f"{i}.png"))
        for i, sample in enumerate(samples, 1)
    ]


def draw_grid(path: Path, columns: dict[str, list[np.ndarray]], rows: list[str] | None = None) -> None:
    """Draws columns of images under their titles, with the names of the `rows` at the left."""
    height = len(next(iter(columns.values())))
    figure = Figure(
        figsize=(1.75 * len(columns) + 0.4 * bool(rows), 1.72 * height + 0.5), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    for column, (title, images) in zip(
        figure.subplots(height, len(columns), squeeze=False).T, columns.items(), strict=True
    ):
        column[0].set_title(title, fontsize=9.5)
        for axes, image in zip(column, images, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, name in zip(figure.axes[:: len(columns)] if rows else (), rows or (), strict=True):
        axes.set_ylabel(name, fontsize=9.5)
    figure.savefig(path)


def draw_curves(path: Path, folders: dict[str, Path]) -> None:
    """Plots held-out loss and PSNR of the runs over steps. Each line has its name at its end."""
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, name, title in (
        (left, "loss", "held-out loss (lower is better)"),
        (right, "psnr", "PSNR of 32 generated images, dB (higher is better)"),
    ):
        ends = []
        for run, folder in folders.items():
            steps, values = read_metric(folder, name)
            axes.plot(steps, values, marker=".", color=COLORS[run])
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
            # The names of lines that end at the same height must not overlap.
            below = sorted(ends)[i - 1][0] if i else -np.inf
            offset = 11 if i and abs(value - below) < 0.03 * np.ptp(axes.get_ylim()) else 0
            axes.annotate(
                text,
                (steps[-1], value),
                (6, offset),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=COLORS[run],
            )
    figure.savefig(path)


def measure_base_model(out: Path) -> dict[str, dict[str, float]]:
    """Draws an example of each edit that the model knows without training, and measures 32 images of each.

    `psnr` and `control_psnr` are the medians for the generated image and for the control image against the target.
    `right` is the fraction of images whose pixels to be edited are closer to the target than to the control.
    """
    columns, figures = {}, {}
    for edit in demo_world.BASE_EDITS:
        folder = train(out, f"dataset.edits=[{edit}]", "dataset.pairs=1", "steps=1", "batch=1", "evaluation.shown=32")
        found = []
        for i, (sample, image) in enumerate(generated_images(folder, 0, 32)):
            control, target = sample.control_pixels()[0].astype(float), sample.pixels().astype(float)
            changes = np.abs(target - control).sum(-1) > 30
            right = np.square(image - target)[changes].mean() < np.square(image - control)[changes].mean()
            found.append((psnr(image, target), psnr(control, target), right))
            if i == 0:
                columns[sample.caption] = [sample.control_pixels()[0], image, sample.pixels()]
        psnrs, control_psnrs, rights = zip(*found, strict=True)
        figures[edit] = {
            "control_psnr": statistics.median(control_psnrs),
            "psnr": statistics.median(psnrs),
            "right": sum(rights) / len(rights),
        }
    draw_grid(DOCS / "base.png", columns, ["control", "generated", "target"])
    return figures


def draw_default_run(folders: dict[str, Path]) -> None:
    """Draws the images of all runs for the same held-out samples, and those before training."""
    steps, psnrs = read_metric(folders[DEFAULT], "psnr")
    before = generated_images(folders[DEFAULT], 0, SCENES)
    columns = {
        "control": [sample.control_pixels()[0] for sample, _ in before],
        f"before training\n{psnrs[0]:.1f} dB": [image for _, image in before],
    }
    for name, folder in folders.items():
        title = f"{name}{' (default)' if name == DEFAULT else ''}\n{read_metric(folder, 'psnr')[1][-1]:.1f} dB"
        columns[title] = [image for _, image in generated_images(folder, steps[-1], SCENES)]
    columns["target"] = [sample.pixels() for sample, _ in before]
    draw_grid(DOCS / "default_run.png", columns)


def screenshot_sweep(out: Path) -> None:
    """Runs a sweep, unless it is finished, and saves a screenshot of MLflow's page with its curves and images."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    sweep = [f"out={out}", "optimizer.lr=5e-4,2e-3", "method.rank=4,16", "steps=40", "evaluation.every=20"]
    command = [sys.executable, "-m", "trainer", "-m", *sweep]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    page = next(line for line in text.splitlines() if line.startswith("curves and pictures: ")).partition("/#")[2]
    options = webdriver.ChromeOptions()
    # Without both paths selenium would download a browser.
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--window-size=1500,1860"):
        options.add_argument(flag)
    server = subprocess.Popen(
        [sys.executable, "-m", "trainer", "ui", "--out", str(out)], stdout=subprocess.PIPE, text=True
    )
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[2].partition("/#")[0]
        # MLflow's assistant opens beside the first page that a browser visits.
        driver.get(f"{address}/health")
        driver.execute_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
        driver.get(f"{address}/#{page}")
        loaded = "return [...document.images].filter(i => i.src.includes('artifact') && i.naturalWidth > 100).length"
        WebDriverWait(driver, 120).until(lambda _: driver.execute_script(loaded) >= 4)
        screenshot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        # A palette makes the file a third as large.
        screenshot.quantize(96).save(DOCS / "sweep.png", optimize=True)
    finally:
        driver.quit()
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--sweep-page", action="store_true", help="make docs/sweep.png only")
    arguments = parser.parse_args()
    out = arguments.out
    DOCS.mkdir(exist_ok=True)
    if arguments.sweep_page:
        screenshot_sweep(out)
        return
    figures = {"base": measure_base_model(out)}
    folders = {
        name: train(out, f"evaluation.shown={SCENES}", "evaluation.every=25", *overrides)
        for name, overrides in RUNS.items()
    }
    draw_default_run(folders)
    draw_curves(DOCS / "rank_and_rate.png", folders)
    figures["before training"] = {name: read_metric(folders[DEFAULT], name)[1][0] for name in ("loss", "psnr")}
    figures |= {
        run: {name: read_metric(folder, name)[1][-1] for name in ("loss", "psnr")} for run, folder in folders.items()
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
