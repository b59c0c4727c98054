"""Measures the speed and memory of the program as ratios to a reference that is measured at the same time.

`make bench` measures everything, which takes about a quarter of an hour on two idle cores, and updates the table in
docs/BENCHMARKS.md. `python -m bench.speed startup memory` measures only these parts and only prints the table.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from bench.inputs import (
    MINI,
    MINIMAL_EVALUATION,
    large_model,
    millions_of_parameters,
    save_cached_tensors,
    save_images,
    tiny_model,
    training_only,
)
from bench.process import Usage, run, run_until, trainer_command

if TYPE_CHECKING:
    from bench.race import Turn

REPORT, MARKER = Path(__file__).parents[1] / "docs" / "BENCHMARKS.md", "<!-- bench -->"
BARE = Path(__file__).parent / "bare.py"
WITHOUT_BITSANDBYTES = (
    "import sys, runpy; sys.modules['bitsandbytes'] = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""Program that runs a script without bitsandbytes, which the trainer does not import either."""
MANY_IMAGES, FEW_IMAGES = 10_000, 100
LATE, EARLY = 10_000, 10
"""Steps at which runs are stopped and resumed."""
JOURNAL = "*/journal.jsonl"


@dataclass(slots=True)
class Row:
    """A row of the table. Each ratio is of two measurements that follow each other."""

    title: str
    ratios: list[float]
    """Of wall-clock times, or of memory."""
    cpu_ratios: list[float] | None
    """Of CPU times, to which other programs on the machine do not add."""
    measured: str
    goal: str = ""

    def __str__(self) -> str:
        ratios, cpu_ratios = format_spread(self.ratios), format_spread(self.cpu_ratios)
        return f"| {self.title} | {ratios} | {cpu_ratios} | {self.goal} | {self.measured} |"


def format_spread(ratios: list[float] | None) -> str:
    """Formats the median and the quartiles."""
    if not ratios:
        return ""
    if len(ratios) == 1:
        return f"{ratios[0]:.3f}"
    low, middle, high = quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


HEADER = "| ratio | wall-clock time | CPU time | goal | measured |\n|---|---|---|---|---|"


# Training loops that take turns


def loops(folder: Path) -> Iterator[Row]:
    """Compares the default program, without MLflow, without cached tensors in memory, and the bare loop."""
    from bench.race import race, trainer

    settings = training_only(folder, MINI)
    tensors = save_cached_tensors(settings, folder)
    batch, steps = 8, 8
    with redirect_stderr(Terminal()):
        turns = race(
            {
                "bare": bare_loop(MINI, tensors, batch),
                "default": trainer([*settings, "seed=1"]),
                "no tracking": trainer([*settings, "seed=2", "tracking=none"]),
                "cache on disk": trainer([*settings, "seed=3", "tracking=none"], cache_in_memory=False),
            },
            steps,
            turns=45,
            tracked="default",
        )
    size = f"{millions_of_parameters(MINI):.1f} M parameters, batch {batch}"
    yield row_of_turns(
        f"time of a step, bare loop / trainer, {size}", turns["bare"], turns["default"], steps, "at least 0.90"
    )
    yield row_of_turns(
        "time of a step, with MLflow / without", turns["default"], turns["no tracking"], steps, "at most 1.02"
    )
    yield row_of_turns(
        "time of a step, cache on disk / in memory",
        turns["cache on disk"],
        turns["no tracking"],
        steps,
        "at most 1.10",
    )


def large(folder: Path) -> Iterator[Row]:
    """Compares the program with the bare loop at about 100 M parameters."""
    from bench.race import race, trainer

    model, batch, steps = large_model(folder), 1, 2
    settings = training_only(folder, model, f"batch={batch}")
    tensors = save_cached_tensors(settings, folder)
    with redirect_stderr(Terminal()):
        turns = race(
            {"bare": bare_loop(model, tensors, batch), "default": trainer([*settings, "seed=1"])},
            steps,
            turns=60,
            tracked="default",
        )
    size = f"{millions_of_parameters(model):.0f} M parameters, batch {batch}"
    yield row_of_turns(
        f"time of a step, bare loop / trainer, {size}", turns["bare"], turns["default"], steps, "at least 0.97"
    )


def row_of_turns(title: str, numerators: list[Turn], denominators: list[Turn], steps: int, goal: str) -> Row:
    ratios, cpu_ratios = ([a[i] / b[i] for a, b in zip(numerators, denominators, strict=True)] for i in (0, 1))
    times = " / ".join(
        f"{1000 * median(turn.seconds for turn in turns) / steps:.0f}" for turns in (numerators, denominators)
    )
    return Row(title, ratios, cpu_ratios, f"{times} ms per step", goal)


def bare_loop(model: Path, tensors: Path, batch: int) -> Callable[[Callable[[], None]], Any]:
    """Returns the bare loop as a contender."""
    from bench.bare import train

    def compete(lap: Callable[[], None]) -> None:
        for _ in train(model, tensors, batch, 10**6):
            lap()

    return compete


class Terminal(io.StringIO):
    """Looks like a terminal, so that progress bars are drawn as often as for a user."""

    def isatty(self) -> bool:
        return True


# Processes of their own


def memory(folder: Path) -> Iterator[Row]:
    """Compares the peak memory with that of the bare loop, in a complete run of three steps with a filled cache."""
    for model, batch, evaluation in (
        (MINI, 8, ()),
        (large_model(folder), 1, ("evaluation.images=2", "evaluation.samples=2")),
    ):
        settings = [f"model.path={model}", f"batch={batch}", "steps=3", f"out={folder / 'memory'}", *evaluation]
        tensors = save_cached_tensors(settings, folder)
        bare = run([sys.executable, "-c", WITHOUT_BITSANDBYTES, BARE, model, tensors, batch, 3]).memory
        digits = 0 if batch == 1 else 1
        title = f"peak memory, trainer / bare loop, {millions_of_parameters(model):.{digits}f} M parameters"
        for suffix, overrides in (
            ("", ()),
            (", without MLflow", ("tracking=none", f"out={folder / 'without_mlflow'}")),
        ):
            used = run(trainer_command(*settings, f"cache.path={folder / 'memory/cache'}", *overrides)).memory
            yield Row(title + suffix, [used / bare], None, f"{used:.0f} / {bare:.0f} MiB")


def startup(folder: Path) -> Iterator[Row]:
    """Compares composing a command line with importing torch, which every training program has to do."""
    pairs = [
        (run(trainer_command("--cfg", "job"), folder), run([sys.executable, "-c", "import torch"], folder))
        for _ in range(10)
    ]
    yield row_of_processes("time, `--cfg job` / `import torch`", *zip(*pairs, strict=True), goal="at most 0.4")


def whole_runs(folder: Path) -> Iterator[Row]:
    """Compares whole runs with diffusers' script, if it is there: of 60 steps, and of one step."""
    from bench import script

    if not script.is_available():
        print(f"The comparison with diffusers' script is left out: set {script.SCRIPT} (see bench/script.py).")
        return
    for steps, title, goal in (
        (script.STEPS, f"time of a run of {script.STEPS} steps", "at most 0.8"),
        (1, "time of a run of one step: start, caching and end", ""),
    ):
        pairs = script.compare(folder, steps)
        title += ", trainer / diffusers' script, one thread"
        yield row_of_processes(title, *zip(*pairs, strict=True), goal=goal)


def resume(folder: Path) -> Iterator[Row]:
    """Compares the time from the command to the first step of a run that was stopped late and one stopped early."""
    stopped = {}
    for step in (EARLY, LATE):
        out = folder / f"stopped-{step}"
        settings = [*tiny_model(folder), *MINIMAL_EVALUATION, "steps=20000", f"save.every={step}", f"out={out}"]
        stopped[step] = settings, out
        run_until(partial(any_exists, out, f"*/checkpoints/step-{step:08d}"), trainer_command(*settings))
    usages: dict[int, list[Usage]] = {EARLY: [], LATE: []}
    for _ in range(5):
        for step, (settings, out) in stopped.items():
            copy = folder / "resumed"
            shutil.copytree(out, copy)
            (size,) = (journal.stat().st_size for journal in copy.glob(JOURNAL))
            usages[step].append(run_until(partial(has_trained, copy, size), trainer_command(*settings, f"out={copy}")))
            shutil.rmtree(copy)
    title = f"time to the first step, resumed at step {LATE:,} / at step {EARLY}"
    yield row_of_processes(title, usages[LATE], usages[EARLY], goal="at most 1.2")


def images(folder: Path) -> Iterator[Row]:
    """Compares the time from the command to the first step with many cached images and with few."""
    settings, encoding = {}, {}
    usages: dict[int, list[Usage]] = {MANY_IMAGES: [], FEW_IMAGES: []}
    for count in usages:
        dataset = folder / f"{count} images"
        save_images(dataset, count)
        settings[count] = [
            *tiny_model(folder),
            *MINIMAL_EVALUATION,
            "dataset=imagefolder",
            f"dataset.path={dataset}",
            "steps=1000",
            f"cache.path={folder / 'cache'}",
            "tracking=none",
        ]
        encoding[count] = run(trainer_command(*settings[count], f"out={folder / 'encoding'}", "stage=cache"))
    for i in range(5):
        for count in usages:
            out = folder / f"{count} {i}"
            command = trainer_command(*settings[count], f"out={out}")
            usages[count].append(run_until(partial(has_trained, out), command))
    title = f"time to the first step, with {MANY_IMAGES:,} cached images / with {FEW_IMAGES}"
    row = row_of_processes(title, usages[MANY_IMAGES], usages[FEW_IMAGES], goal="seconds")
    row.measured += f"; checking and encoding the images before took {encoding[MANY_IMAGES].seconds:.0f} s"
    yield row


def row_of_processes(title: str, numerators: Sequence[Usage], denominators: Sequence[Usage], *, goal: str) -> Row:
    pairs = list(zip(numerators, denominators, strict=True))
    ratios = [a.seconds / b.seconds for a, b in pairs]
    cpu_ratios = [a.cpu_seconds / b.cpu_seconds for a, b in pairs]
    times = " / ".join(f"{median(usage.seconds for usage in side):.1f}" for side in (numerators, denominators))
    return Row(title, ratios, cpu_ratios, f"{times} s", goal)


def any_exists(folder: Path, pattern: str) -> bool:
    return any(folder.glob(pattern))


def has_trained(out: Path, start: int = 0) -> bool:
    """Whether the journal of the run in `out` records a step after byte `start`."""
    for path in out.glob(JOURNAL):
        with open(path, "rb") as file:
            file.seek(start)
            return b'"train/loss"' in file.read()
    return False


# The table


def describe_machine() -> str:
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = (
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        cpu = next((value.strip() for _, value in lines), cpu)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "mlflow", "hydra-core"))
    return (
        f"{date.today().isoformat()}, {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads per process, "
        f"load {os.getloadavg()[0]:.1f} before the start; Python {platform.python_version()}, {packages}."
    )


PARTS = {
    "startup": startup,
    "script": whole_runs,
    "loops": loops,
    "large": large,
    "memory": memory,
    "resume": resume,
    "pictures": images,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "parts",
        nargs="*",
        choices=[[], *PARTS],
        metavar="PART",
        help=f"what to measure: {', '.join(PARTS)}; default: everything, to update docs/BENCHMARKS.md",
    )
    selected = parser.parse_args().parts
    table = [describe_machine(), "", HEADER]
    print("\n".join(table), flush=True)
    for name in selected or PARTS:
        with tempfile.TemporaryDirectory() as temporary:
            for row in PARTS[name](Path(temporary)):
                table.append(str(row))
                print(row, flush=True)
    if not selected:
        REPORT.write_text(replace_table(REPORT.read_text(), table))


def replace_table(text: str, lines: list[str]) -> str:
    """Replaces the lines between the two markers in `text`."""
    before, _, after = text.split(MARKER)
    return "\n".join([before + MARKER, *lines, MARKER + after])


if __name__ == "__main__":
    main()
