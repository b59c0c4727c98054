"""How fast the program is, as ratios to something that was measured beside it.

`make bench` measures all, in about a quarter of an hour on two idle cores, and writes the table into README.md between its two markers.
`python -m bench.speed startup memory` measures only what is named, and only prints.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

import psutil

from trainer.core.libraries import hide_bitsandbytes

hide_bitsandbytes()  # it would be part of the bare loop's memory

ROOT = Path(__file__).parents[1]
README, MARKER = ROOT / "README.md", "<!-- bench -->"
BARE, CHILD = (Path(__file__).parent / name for name in ("bare.py", "child.py"))
MINI = ROOT / "trainer/model/mini_kontext/weights"
LARGE = {
    "in_channels": 32,
    "num_layers": 1,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 16,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (8, 28, 28),
}
PICTURES = 10_000
JOURNAL = "*/journal.jsonl"
FAR, NEAR = 10_000, 10
"""Steps after which a run is resumed."""
SMALL = ["evaluation.images=1", "evaluation.samples=1", "sample.steps=1", "evaluation.every=1000000"]
"""Little to measure at step 0, and nothing later."""


@dataclass(slots=True)
class Row:
    """A line of the table. `ratios`: of neighbours in time; `processor`: the same in processor time, which other programs do not lengthen."""

    what: str
    ratios: list[float]
    processor: list[float] | None
    measured: str
    goal: str = ""

    def __str__(self) -> str:
        return f"| {self.what} | {spread(self.ratios)} | {spread(self.processor)} | {self.goal} | {self.measured} |"


def spread(ratios: list[float] | None) -> str:
    """Median, and quartiles."""
    if not ratios:
        return ""
    if len(ratios) == 1:
        return f"{ratios[0]:.3f}"
    low, middle, high = quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


HEAD = "| | by the clock | by processor time | goal | measured |\n|---|---|---|---|---|"


# Training loops that take turns


def loops(place: Path) -> Iterator[Row]:
    """The program as it comes, without MLflow, with its cache read at every use, and the bare loop."""
    from bench.race import race, trainer

    settings = quick(place, MINI)
    tensors = cached_tensors(settings, place)
    batch, steps = 8, 8
    sys.stderr = Terminal()
    found = race(
        {
            "bare": bare(MINI, tensors, batch),
            "default": trainer([*settings, "seed=1"]),
            "none": trainer([*settings, "seed=2", "tracking=none"]),
            "files": trainer([*settings, "seed=3", "tracking=none"], held=False),
        },
        steps,
        turns=45,
        gated="default",
    )
    sys.stderr = sys.__stderr__
    yield raced(
        found,
        "bare",
        "default",
        steps,
        f"trainer's speed over the bare loop's, {count(MINI):.1f} M parameters, batch 8",
        "at least 0.90",
    )
    yield raced(found, "default", "none", steps, "a step with MLflow over one without", "at most 1.02")
    yield raced(found, "files", "none", steps, "an epoch from the cache's files over one from memory", "at most 1.10")


def large(place: Path) -> Iterator[Row]:
    """The same at some 100 M parameters."""
    from bench.race import race, trainer

    model = large_model(place)
    settings = quick(place, model, "batch=1")
    tensors = cached_tensors(settings, place)
    sys.stderr = Terminal()
    found = race(
        {"bare": bare(model, tensors, 1), "default": trainer([*settings, "seed=1"])},
        steps := 2,
        turns=60,
        gated="default",
    )
    sys.stderr = sys.__stderr__
    yield raced(
        found, "bare", "default", steps, f"the same at {count(model):.0f} M parameters, batch 1", "at least 0.97"
    )


def raced(found: dict, over: str, under: str, steps: int, what: str, goal: str) -> Row:
    clock, processor = ([a[i] / b[i] for a, b in zip(found[over], found[under], strict=True)] for i in (0, 1))
    times = " / ".join(f"{1000 * median(turn.clock for turn in found[name]) / steps:.0f}" for name in (over, under))
    return Row(what, clock, processor, f"{times} ms a step", goal)


def bare(model: Path, tensors: Path, batch: int) -> Callable[[Callable[[], None]], None]:
    from bench.bare import train

    def compete(lap: Callable[[], None]) -> None:
        for _ in train(model, tensors, batch, 10**6):
            lap()

    return compete


# Processes of their own


def memory(place: Path) -> Iterator[Row]:
    """The program's memory at its highest over that of the bare loop; a run of three steps from a warm cache, with its evaluations and ending."""
    for model, batch, more in ((MINI, 8, ()), (large_model(place), 1, ("evaluation.images=2", "evaluation.samples=2"))):
        settings = [f"model.path={model}", f"batch={batch}", "steps=3", f"out={place / 'memory'}", *more]
        tensors = cached_tensors(settings, place)
        hidden = "import sys, runpy; sys.modules['bitsandbytes'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        theirs = run([sys.executable, "-c", hidden, BARE, model, tensors, batch, 3]).peak
        what = f"peak memory over the bare loop's, {count(model):.{0 if batch == 1 else 1}f} M parameters"
        for told, extra in (("", ()), ("; without MLflow", ("tracking=none", f"out={place / 'untold'}"))):
            ours = run(trainer_command(*settings, f"cache.path={place / 'memory/cache'}", *extra)).peak
            yield Row(what + told, [ours / theirs], None, f"{ours:.0f} / {theirs:.0f} MiB")


def startup(place: Path) -> Iterator[Row]:
    """Composing a command line over what every program that trains has to do first."""
    pairs = [
        (run(trainer_command("--cfg", "job"), place), run([sys.executable, "-c", "import torch"], place))
        for _ in range(10)
    ]
    yield side_by_side("`--cfg job` over `import torch`", *zip(*pairs, strict=True), "at most 0.4")


def resume(place: Path) -> Iterator[Row]:
    """From typing the command to the first step, of a run stopped early and of one stopped late."""
    stopped = {}
    for step in (NEAR, FAR):
        settings = [*tiny(place), *SMALL, "steps=20000", f"save.every={step}", f"out={place / f'stopped-{step}'}"]
        stopped[step] = settings, place / f"stopped-{step}"
        until(partial(there, place / f"stopped-{step}", f"*/checkpoints/step-{step:08d}"), trainer_command(*settings))
    begun = {NEAR: [], FAR: []}
    for _ in range(5):
        for step, (settings, out) in stopped.items():
            copy = place / "resumed"
            shutil.copytree(out, copy)
            (size,) = (journal.stat().st_size for journal in copy.glob(JOURNAL))
            begun[step].append(until(partial(trained, copy, size), trainer_command(*settings, f"out={copy}")))
            shutil.rmtree(copy)
    yield side_by_side(
        f"to the first step, resumed at step {FAR:,} over at step {NEAR}", begun[FAR], begun[NEAR], "at most 1.2"
    )


def pictures(place: Path) -> Iterator[Row]:
    """From typing the command to the first step, of many pictures that are cached already and of few."""
    settings, first, begun = {}, {}, {PICTURES: [], PICTURES // 100: []}
    for amount in begun:
        folder = place / f"{amount} pictures"
        draw(folder, amount)
        settings[amount] = [*tiny(place), *SMALL, "dataset=imagefolder", f"dataset.path={folder}", "steps=1000"]
        settings[amount] += [f"cache.path={place / 'cache'}", "tracking=none"]
        first[amount] = run(trainer_command(*settings[amount], f"out={place / 'first'}", "stage=cache"))
    for i in range(5):
        for amount in begun:
            out = place / f"{amount} {i}"
            begun[amount].append(until(partial(trained, out), trainer_command(*settings[amount], f"out={out}")))
    row = side_by_side(
        f"to the first step with {PICTURES:,} cached pictures over with {PICTURES // 100}", *begun.values(), "seconds"
    )
    row.measured += f"; checking and encoding them before: {first[PICTURES].seconds:.0f} s"
    yield row


def side_by_side(what: str, over: Sequence[Done], under: Sequence[Done], goal: str) -> Row:
    clock, processor = (
        [getattr(a, kind) / getattr(b, kind) for a, b in zip(over, under, strict=True)]
        for kind in ("seconds", "processor")
    )
    times = " / ".join(f"{median(done.seconds for done in side):.1f}" for side in (over, under))
    return Row(what, clock, processor, f"{times} s", goal)


@dataclass(slots=True)
class Done:
    """A process that has ended: its time, that of its processors, and its memory at the highest in MiB."""

    seconds: float
    processor: float
    peak: float


def run(command: list, cwd: Path | None = None) -> Done:
    words = [str(word) for word in command]
    done = subprocess.run([sys.executable, "-S", CHILD, *words], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    return Done(**json.loads(done.stdout))


def until(reached: Callable[[], bool], command: list) -> Done:
    """A process from its start to what is waited for; then it is killed."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([str(word) for word in command], stdout=said, stderr=said)
        try:
            while not reached():
                if process.poll() is not None:
                    said.seek(0)
                    raise SystemExit(f"{' '.join(map(str, command))}\n{said.read().decode()}")
                time.sleep(0.01)
            used = psutil.Process(process.pid)
            return Done(time.perf_counter() - began, sum(used.cpu_times()[:2]), used.memory_info().rss / 2**20)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def there(folder: Path, pattern: str) -> bool:
    return any(folder.glob(pattern))


def trained(out: Path, start: int = 0) -> bool:
    """Whether a step stands in the journal of the run in this folder, behind this byte."""
    for path in out.glob(JOURNAL):
        with open(path, "rb") as file:
            file.seek(start)
            return b'"train/loss"' in file.read()
    return False


def trainer_command(*settings: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *settings]


# What they work on


def quick(place: Path, model: Path, *more: str) -> list[str]:
    """Settings of a run that does nothing but train."""
    return [
        f"out={place / 'race'}",
        f"model.path={model}",
        "steps=1000000",
        "save.every=1000000",
        "log.every=1",
        *SMALL,
        *more,
    ]


def cached_tensors(settings: list[str], place: Path) -> Path:
    """The cached parts of all samples to train on, stacked, in one file."""
    import torch
    from safetensors.torch import save_file

    from trainer.config.compose import compose_config, to_run
    from trainer.training.data import prepare

    run(trainer_command(*settings, "stage=cache"))
    material = prepare(to_run(compose_config(settings), settings))
    rows = [material.cache.example(material.transform.apply(sample)) for sample in material.split.train]
    path = place / "tensors.safetensors"
    save_file({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, path)
    return path


def large_model(place: Path) -> Path:
    """The mini model's folder with a transformer of random weights in place of its own."""
    import torch

    from trainer.model import quiet_libraries

    folder = place / "large"
    if not folder.exists():
        quiet_libraries()
        from diffusers import FluxTransformer2DModel

        shutil.copytree(MINI, folder, ignore=shutil.ignore_patterns("transformer"))
        torch.manual_seed(0)
        FluxTransformer2DModel(**LARGE).save_pretrained(folder / "transformer")
    return folder


def count(model: Path) -> float:
    """Millions of parameters."""
    from trainer.model.flux_kontext import FluxKontext

    return sum(parameter.numel() for parameter in FluxKontext(path=str(model)).meta_model().parameters()) / 1e6


def tiny(place: Path) -> list[str]:
    """Settings of the smallest model there is: what is left is what does not depend on the model."""
    from trainer.model.flux_kontext import FluxKontext

    folder = place / "tiny"
    made = folder / "settings.json"
    if not made.exists():
        made.write_text(json.dumps(FluxKontext.save_tiny_checkpoint(folder)))
    return ["model=flux_kontext", *json.loads(made.read_text()), "batch=1", "model.encoder_dtype=float32"]


def draw(folder: Path, amount: int) -> None:
    """Pictures of one colour each, with captions."""
    from PIL import Image

    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as table:
        for i in range(amount):
            Image.new("RGB", (40, 32), (i % 256, i // 256 % 256, 90)).save(folder / f"{i:05d}.png")
            table.write(json.dumps({"file_name": f"{i:05d}.png", "text": f"a photo of the night {i % 10}"}) + "\n")


class Terminal(io.StringIO):
    """Progress bars are drawn as often as a user sees them."""

    def isatty(self) -> bool:
        return True


# The table


def machine() -> str:
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
        f"{date.today().isoformat()}, {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads a process, "
        f"load {os.getloadavg()[0]:.1f} before; Python {platform.python_version()}, {packages}."
    )


PARTS = {part.__name__: part for part in (startup, loops, large, memory, resume, pictures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], help="what to measure; all, and into the README, where none is named"
    )
    asked = parser.parse_args().parts
    table = [machine(), "", HEAD]
    print("\n".join(table), flush=True)
    for name in asked or PARTS:
        with tempfile.TemporaryDirectory() as temporary:
            for row in PARTS[name](Path(temporary)):
                table.append(str(row))
                print(row, flush=True)
    if not asked:
        README.write_text(between_markers(README.read_text(), table))


def between_markers(text: str, lines: list[str]) -> str:
    before, _, after = text.split(MARKER)
    return "\n".join([before + MARKER, *lines, MARKER + after])


if __name__ == "__main__":
    main()
