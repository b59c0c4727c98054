"""Compares whole runs with diffusers' training script for LoRA on FLUX Kontext, which does the same work.

The script is not part of this repository. Name it, and a Python with its requirements, in two environment variables:

    KONTEXT_SCRIPT=diffusers/examples/dreambooth/train_dreambooth_lora_flux_kontext.py KONTEXT_PYTHON=.../bin/python
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.inputs import save_kontext_model, save_pairs
from bench.process import Usage, run, trainer_command

SCRIPT, PYTHON = "KONTEXT_SCRIPT", "KONTEXT_PYTHON"
PAIRS, RESOLUTION, STEPS, TURNS = 22, 128, 60, 7
TARGETS = (
    *(f"attn.{name}" for name in ("to_k", "to_q", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")),
    *(f"{name}.{layer}" for name in ("ff", "ff_context") for layer in ("net.0.proj", "net.2")),
    "proj_mlp",
)
"""The layers that the script adapts."""
ONE_THREAD = ("env", "OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1")


def is_available() -> bool:
    return SCRIPT in os.environ


def compare(folder: Path, steps: int) -> list[tuple[Usage, Usage]]:
    """Returns the usage of whole runs of the trainer and of the script, in turns; both start without a cache."""
    model, pairs = folder / "model", folder / "pairs"
    if not model.exists():
        save_kontext_model(model)
        save_pairs(pairs, folder / "table", PAIRS)
    measured = []
    for turn in range(TURNS + 1):
        out = folder / f"{steps} steps {turn}"
        measured.append(
            (
                run([*ONE_THREAD, *trainer_command(*trainer_settings(model, pairs, out, steps))], folder),
                run([*ONE_THREAD, *script_command(model, folder / "table", out, steps)], folder),
            )
        )
    # The first turn reads the libraries from the disk.
    return measured[1:]


def trainer_settings(model: Path, pairs: Path, out: Path, steps: int) -> Iterator[str]:
    yield from ("model=flux_kontext", f"model.path={model}", "dataset=pairs", f"dataset.path={pairs}")
    yield from (f"dataset.resolution={RESOLUTION}", "dataset.validation_fraction=0", "evaluation.images=0")
    yield from ("precision=fp32", "batch=2", "hardware.micro_batch=2", f"steps={steps}", "save.every=100000")
    yield from ("optimizer=adamw", "optimizer.lr=1e-4", "lr_scheduler=constant", "method.rank=16")
    yield from (f"method.targets=[{','.join(TARGETS)}]", "tracking=none", f"out={out / 'trainer'}")


def script_command(model: Path, table: Path, out: Path, steps: int) -> list[object]:
    settings = {
        "pretrained_model_name_or_path": model,
        "dataset_name": table,
        "cache_dir": out / "table",
        "image_column": "image",
        "cond_image_column": "control",
        "caption_column": "caption",
        "instance_prompt": "make it night",
        "output_dir": out / "script",
        "resolution": RESOLUTION,
        "train_batch_size": 2,
        "max_train_steps": steps,
        "learning_rate": 1e-4,
        "rank": 16,
        "lora_alpha": 16,
        "mixed_precision": "no",
        "guidance_scale": 1,
        "optimizer": "adamw",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "seed": 0,
        "checkpointing_steps": 100000,
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    return [os.environ.get(PYTHON, sys.executable), os.environ[SCRIPT], "--cache_latents", *arguments]
