"""What a run says of itself, on the terminal and to MLflow."""

from __future__ import annotations

import platform
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import __version__
from trainer.config.groups import option_name
from trainer.config.identity import flatten, to_plain
from trainer.core.console import refresh_interval

if TYPE_CHECKING:
    from trainer.config.schema import Run
    from trainer.training.loop import Step

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "pillow", "safetensors")

ATTEMPT = ("hardware", "evaluation", "sample", "save", "log")
"""The rooms whose settings may differ between attempts at one run."""


def name_of(run: Run, id: str, overrides: list[str]) -> str:
    """How MLflow lists the run: what was typed and bears on the result, for that is what tells it from its neighbours."""
    if run.name:
        return run.name
    silent = ("stage", "out", "name", "fresh", "resume", "hydra", "sweep", "export", *ATTEMPT, "tracking", "cache")
    typed = [text.lstrip("+") for text in overrides if text.lstrip("+~").split("=")[0].split(".")[0] not in silent]
    return f"{short(typed)[:240] or 'defaults'} [{id[:6]}]"


def short(settings: Sequence[str]) -> str:
    """`optimizer.lr=1e-4 method.rank=4` as `lr=1e-4 rank=4`, for lists are narrow; names that would then be the same stay whole."""
    lasts = Counter(text.partition("=")[0].rpartition(".")[2] for text in settings)
    pairs = [text.partition("=") for text in settings]
    return " ".join(
        (key if lasts[last := key.rpartition(".")[2]] > 1 else last) + mark + value for key, mark, value in pairs
    )


def provenance(device: Any) -> dict[str, Any]:
    """Where and with what this attempt runs."""
    import torch

    there = {}
    for package in PACKAGES:
        try:
            there[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "program": __version__,
        "git": _git(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.processor() or platform.machine()})",
        "threads": torch.get_num_threads(),
        "packages": there,
    }


def _git() -> str | None:
    """The commit of the program's own checkout, with + where it was changed."""
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--match="],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip() or None


def tags(
    run: Run, folder: Path, id: str, manifest: dict[str, Any], attempt: int, begun: dict[str, Any]
) -> dict[str, str]:
    """What may differ between attempts at one run, numbered, and by what runs are told apart and found."""
    fixed = {
        "identity": id,
        "trainer.folder_id": manifest["folder_id"],
        "trainer.folder": str(folder.absolute()),
        "trainer.host": socket.gethostname(),
        "data": manifest["digests"]["data"][:12],
    }
    if manifest["parent"]:
        fixed["trainer.parent"] = manifest["parent"]
    machine = (
        f"{begun['host']}: {begun['device']}, {begun['threads']} threads, {begun['platform']}, Python {begun['python']}"
    )
    loose = to_plain(run)
    # One tag each: MLflow shows them all, and dozens would hide those above.
    values = {
        "git": begun["git"],
        "machine": machine,
        "versions": ", ".join(
            f"{name} {number}" for name, number in {"trainer": begun["program"], **begun["packages"]}.items()
        ),
        "settings": _typed({name: loose[name] for name in ATTEMPT}),
    }
    return fixed | {f"attempt.{attempt}.{name}": value for name, value in values.items() if value}


def _typed(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in flatten(settings).items() if value is not None)


def description(run: Run, folder: Path, counts: str) -> str:
    """The text on top of the run's MLflow page."""
    kinds = {room: option_name(getattr(run, room)) for room in ("method", "dataset")}
    source = f" from `{run.dataset.path}`" if run.dataset.path else ""
    return (
        f"**{kinds['method']}** on `{run.model.path}` with **{kinds['dataset']}** data{source}: {counts}.\n\n"
        "Judge by **val/loss** (held out, fixed noise and times: lower is better, comparable between runs) and **val/psnr** "
        "(drawn pictures against targets, dB; higher is better). Pictures: *Model metrics > samples*, with a step slider; "
        "the corner of a card enlarges it.\n\n"
        f"Folder: `{folder.absolute()}`"
    )


class Progress:
    """The progress bar on stderr, and the speed that it knows."""

    def __init__(self, steps: int, start: int, batch: int):
        from tqdm import tqdm

        self.batch = batch
        self.bar = tqdm(
            total=steps, initial=start, desc="training", unit="step", mininterval=refresh_interval(), dynamic_ncols=True
        )
        self.then = time.perf_counter()

    def step(self, done: Step) -> dict[str, float]:
        """Show one more step; speeds over it."""
        then, self.then = self.then, time.perf_counter()
        seconds = self.then - then
        self.bar.set_postfix_str(f"loss {done.loss:.4f}, lr {done.lr:.2e}", refresh=False)
        self.bar.update(1)
        return {"perf/steps_per_second": 1 / seconds, "perf/samples_per_second": self.batch / seconds}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        then = time.perf_counter()
        yield
        self.then += time.perf_counter() - then

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
