"""Measures FLUX Kontext at its real size, with random weights, on the GPU of this machine.

`python -m bench.real_size` prints seconds per step and memory for each storage of the frozen weights, and whether a
killed run resumes with the same weights. It needs 25 GB of disk, 24 GB of them for the weights, and no network.
`python -m bench.real_size --blocks 1 1 --resolution 64 --device cpu` is a small version for any machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file

from bench.inputs import MINI
from bench.process import run, trainer_command
from trainer.model.flux.layout import save_text_encoders, save_tokenizers
from trainer.model.pretrained import quiet_libraries
from trainer.model.weights import on_meta_device, save_shards
from trainer.tracking.journal import read_records

STORAGES = ("bf16", "fp8", "int8", "nf4", "fp4")
MAX_TOKENS = 512
WARM_UP = 3
"""Steps that are not measured."""
QUIET = [
    "tracking=none",
    "log.every=1",
    "evaluation.images=0",
    "evaluation.samples=1",
    "evaluation.every=1000",
    "save.every=1000",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "storages",
        nargs="*",
        choices=[[], *STORAGES],
        metavar="STORAGE",
        help=f"what to measure: {', '.join(STORAGES)}; default: all",
    )
    parser.add_argument(
        "--blocks",
        nargs=2,
        type=int,
        default=(19, 38),
        metavar=("DOUBLE", "SINGLE"),
        help="number of blocks of the transformer",
    )
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        typed = " ".join(["python -m bench.real_size", *sys.argv[1:]])
        print(f"{date.today().isoformat()}, {describe_machine(arguments.device)}; `{typed}`\n", flush=True)
        print(check_resuming(folder / "resumed", arguments.device), flush=True)
        start = time.perf_counter()
        count = save_random_model(folder / "model", *arguments.blocks, torch.device(arguments.device))
        print(f"{count / 1e9:.2f} billion random weights created in {time.perf_counter() - start:.0f} s\n", flush=True)
        print("| frozen weights | checkpointing | s per step | peak device memory, GiB | s to the first step | loss |")
        print("|---|---|---|---|---|---|", flush=True)
        for storage in arguments.storages or STORAGES:
            for checkpointing in (False, True):
                print(measure(folder, storage, checkpointing, arguments), flush=True)


def describe_machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return f"{name}, torch {torch.__version__}"


def save_random_model(folder: Path, double: int, single: int, device: torch.device) -> int:
    """Saves a checkpoint with the layout and sizes of the published one; returns the transformer's number of weights.

    Only the T5 encoder is smaller: its output has the published width, but it has two small layers.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    quiet_libraries()
    with on_meta_device():
        network = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
    network.save_config(folder / "transformer")
    torch.manual_seed(0)
    save_shards(
        ((name, random_weight(name, parameter.shape, device)) for name, parameter in network.named_parameters()),
        folder / "transformer",
    )
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).to(torch.bfloat16).save_pretrained(folder / "vae")
    words = save_tokenizers(folder, ("make", "it", "night"), MAX_TOKENS)
    for width, encoder in (
        (network.config.joint_attention_dim, "text_encoder_2"),
        (network.config.pooled_projection_dim, "text_encoder"),
    ):
        save_text_encoders(folder / str(width), *words, MAX_TOKENS, width)
        (folder / str(width) / encoder).rename(folder / encoder)
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    return sum(parameter.numel() for parameter in network.parameters())


def random_weight(name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Returns a weight of realistic size: 1 in norms, standard deviation 0.02 in matrices, 0 in biases."""
    if len(shape) > 1:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
    return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)


def measure(folder: Path, storage: str, checkpointing: bool, arguments: argparse.Namespace) -> str:
    """Trains for a few steps and returns a row of the table."""
    out = folder / f"{storage}-{checkpointing}"
    start = time.time()
    run_trainer(
        "model=flux_kontext",
        f"model.path={folder / 'model'}",
        f"precision={storage}",
        f"hardware.gradient_checkpointing={str(checkpointing).lower()}",
        f"hardware.device={arguments.device}",
        f"dataset.resolution={arguments.resolution}",
        "dataset.pairs=4",
        "dataset.held_out=1",
        f"steps={arguments.steps}",
        "batch=1",
        "method.rank=16",
        f"cache.path={folder / 'cache'}",
        f"out={out}",
        *QUIET,
    )
    steps = [record for record in metric_records(out) if "train/loss" in record["values"]]
    times = [record["time"] for record in steps]
    seconds = median(later - earlier for earlier, later in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False))
    last = steps[-1]["values"]
    peak = last.get("system/device_memory_peak_gib", last["system/memory_gib"])
    values = f"{seconds:.3f} | {peak:.1f} | {times[0] - start:.0f} | {last['train/loss']:.4f}"
    return f"| {storage} | {'yes' if checkpointing else 'no'} | {values} |"


def check_resuming(folder: Path, device: str) -> str:
    """Trains the mini model for 12 steps, uninterrupted and killed after 8 steps, and compares the weights."""
    settings = [
        f"model.path={MINI}",
        "steps=12",
        "save.every=4",
        f"hardware.device={device}",
        f"cache.path={folder / 'cache'}",
        *QUIET[:-1],
    ]
    run_trainer(*settings, f"out={folder / 'uninterrupted'}")
    killed = subprocess.Popen(
        trainer_command(*settings, f"out={folder / 'killed'}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while killed.poll() is None and not any((folder / "killed").glob("*/checkpoints/step-00000008")):
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    run_trainer(*settings, f"out={folder / 'killed'}")
    expected, found = (load_file(export_path(folder / name)) for name in ("uninterrupted", "killed"))
    difference = max((expected[name] - found[name]).abs().max().item() for name in expected)
    attempts = sum(record["kind"] == "attempt" for record in journal_records(folder / "killed"))
    return (
        f"killed at step 8 of 12 and resumed ({attempts} attempts): weights differ from those of an uninterrupted run "
        f"by at most {difference:.1e}"
    )


def run_trainer(*settings: str) -> None:
    run(trainer_command(*settings))


def export_path(out: Path) -> Path:
    (path,) = out.glob("*/export/pytorch_lora_weights.safetensors")
    return path


def journal_records(out: Path) -> Iterator[dict]:
    (path,) = out.glob("*/journal.jsonl")
    return (record for _, record in read_records(path))


def metric_records(out: Path) -> list[dict]:
    return [record for record in journal_records(out) if record["kind"] == "metrics"]


if __name__ == "__main__":
    main()
