"""The README's pictures: the default run beside others that differ in rank and learning rate.

`make pictures` trains each (some forty seconds on two cores) and writes docs/default_run.png and docs/rank_and_rate.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer import config
from trainer.dataset import strip
from trainer.material import drawn, prepare
from trainer.tracking.journal import read

DOCS = Path(__file__).parents[1] / "docs"
MEMBERS = {
    "rank 1, 1e-4": ["method.rank=1", "optimizer.lr=1e-4"],
    "rank 1, 2e-3": ["method.rank=1"],
    "rank 16, 1e-4": ["optimizer.lr=1e-4"],
    "rank 16, 2e-3": [],
}
SCENES = 4


def folder_of(out: Path, overrides: list[str]) -> Path:
    """Train (or find finished) the run with these settings, and return its folder."""
    command = [
        sys.executable,
        "-m",
        "trainer",
        f"out={out}",
        "tracking=none",
        f"evaluation.shown={SCENES}",
        "evaluation.every=25",
        *overrides,
    ]
    subprocess.run(command, check=True)
    checked = subprocess.run([*command, "stage=check"], check=True, capture_output=True, text=True).stdout
    return out / checked.split()[1]


def held_out(folder: Path, name: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record["values"][name]) for _, record in read(folder / "journal.jsonl") if name in record.get("values", {})]
    return [step for step, _ in points], [value for _, value in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"))
    out = parser.parse_args().out
    folders = {name: folder_of(out, overrides) for name, overrides in MEMBERS.items()}
    best = folders["rank 16, 2e-3"]
    last = max(best.glob("pictures/step-*")).name

    DOCS.mkdir(exist_ok=True)
    rows = []
    run = config.from_yaml(best / "config.yaml")
    for i, (view, _) in enumerate(drawn(run, prepare(run))[:SCENES], 1):
        row = {"control": view.control_pixels()[0], "before": strip.load(best / "pictures" / "step-00000000" / f"{i}.png")}
        row |= {name: strip.load(folder / "pictures" / last / f"{i}.png") for name, folder in folders.items()}
        rows.append(strip.strip(row | {"target": view.pixels()}))
    strip.save(DOCS / "default_run.png", strip.sheet(rows))

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name, title in zip(
        figure.subplots(1, 2), ("val/loss", "val/psnr"), ("held-out loss", "PSNR of drawn pictures, dB"), strict=True
    ):
        for member, folder in folders.items():
            axes.plot(*held_out(folder, name), marker=".", label=member)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.axes[0].set_yscale("log")
    figure.savefig(DOCS / "rank_and_rate.png", dpi=110)
    results = {name: {key: held_out(folder, f"val/{key}")[1][-1] for key in ("loss", "psnr")} for name, folder in folders.items()}
    results["before training"] = {key: held_out(best, f"val/{key}")[1][0] for key in ("loss", "psnr")}
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
