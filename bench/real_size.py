"""Seconds a step and memory of FLUX Kontext at its real size, with random weights, on the GPU of this machine; and whether a run resumes there.

`python -m bench.real_size` prints a table. It takes 25 GB of disk, 24 of them the weights. Nothing is downloaded, and MLflow is not used.
`python -m bench.real_size --blocks 1 1 --resolution 64 --device cpu` tries it out on anything.
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

from trainer.core.libraries import hide_bitsandbytes
from trainer.model import on_meta_device, quiet_libraries, save_shards
from trainer.model.mini_kontext.build import save_text_encoders, save_tokenizers
from trainer.tracking.journal import read

MINI = Path(__file__).parents[1] / "trainer/model/mini_kontext/weights"
STORAGES = ("bf16", "fp8", "int8", "nf4", "fp4")
LENGTH = 512
WARM_UP = 3
"""Steps that do not count."""
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
    parser.add_argument("storages", nargs="*", choices=[[], *STORAGES], help="all where none is named")
    parser.add_argument(
        "--blocks", nargs=2, type=int, default=(19, 38), metavar=("DOUBLE", "SINGLE"), help="of the transformer"
    )
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        print(
            f"{date.today().isoformat()}, {machine(asked.device)}; `{' '.join(['python -m bench.real_size', *sys.argv[1:]])}`\n",
            flush=True,
        )
        print(resumed(place / "resumed", asked.device), flush=True)
        began = time.perf_counter()
        count = make(place / "model", *asked.blocks, torch.device(asked.device))
        print(f"made {count / 1e9:.2f} billion random weights in {time.perf_counter() - began:.0f} s\n", flush=True)
        print(
            "| frozen weights | checkpointing | s / step | device memory at its highest, GiB | seconds to the first step | loss |"
        )
        print("|---|---|---|---|---|---|", flush=True)
        for storage in asked.storages or STORAGES:
            for checkpointing in (False, True):
                print(measured(place, storage, checkpointing, asked), flush=True)


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return f"{name}, torch {torch.__version__}"


def make(folder: Path, double: int, single: int, device: torch.device) -> int:
    """The published checkpoint's layout and sizes, less T5's: its encoder has as wide an output, but two small layers. Returns how many
    weights the transformer has."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    quiet_libraries()
    with on_meta_device():
        network = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
    network.save_config(folder / "transformer")
    torch.manual_seed(0)
    save_shards(
        ((name, weight(name, parameter.shape, device)) for name, parameter in network.named_parameters()),
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
    words = save_tokenizers(folder, ("make", "it", "night"), LENGTH)
    for width, encoder in (
        (network.config.joint_attention_dim, "text_encoder_2"),
        (network.config.pooled_projection_dim, "text_encoder"),
    ):
        save_text_encoders(folder / str(width), *words, LENGTH, width)
        (folder / str(width) / encoder).rename(folder / encoder)
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    return sum(parameter.numel() for parameter in network.parameters())


def weight(name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """As wide as trained ones are: norms of one, other weights of 0.02, no biases."""
    if len(shape) > 1:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
    return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)


def measured(place: Path, storage: str, checkpointing: bool, asked: argparse.Namespace) -> str:
    out = place / f"{storage}-{checkpointing}"
    began = time.time()
    run(
        "model=flux_kontext",
        f"model.path={place / 'model'}",
        f"precision={storage}",
        f"hardware.gradient_checkpointing={str(checkpointing).lower()}",
        f"hardware.device={asked.device}",
        f"dataset.resolution={asked.resolution}",
        "dataset.pairs=4",
        "dataset.held_out=1",
        f"steps={asked.steps}",
        "batch=1",
        "method.rank=16",
        f"cache.path={place / 'cache'}",
        f"out={out}",
        *QUIET,
    )
    steps = [record for record in records(out) if "train/loss" in record["values"]]
    times = [record["time"] for record in steps]
    seconds = median(later - earlier for earlier, later in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False))
    last = steps[-1]["values"]
    peak = last.get("system/device_memory_peak_gib", last["system/memory_gib"])
    return f"| {storage} | {'yes' if checkpointing else 'no'} | {seconds:.3f} | {peak:.1f} | {times[0] - began:.0f} | {last['train/loss']:.4f} |"


def resumed(place: Path, device: str) -> str:
    """Whether the mini model, killed after eight of twelve steps and run again, ends with the weights of a run that was never stopped."""
    settings = [
        f"model.path={MINI}",
        "steps=12",
        "save.every=4",
        f"hardware.device={device}",
        f"cache.path={place / 'cache'}",
        *QUIET[:-1],
    ]
    run(*settings, f"out={place / 'whole'}")
    killed = subprocess.Popen(
        command(*settings, f"out={place / 'killed'}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while killed.poll() is None and not any((place / "killed").glob("*/checkpoints/step-00000008")):
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    run(*settings, f"out={place / 'killed'}")
    one, other = (load_file(exported(place / name)) for name in ("whole", "killed"))
    most = max((one[name] - other[name]).abs().max().item() for name in one)
    attempts = sum(record["kind"] == "attempt" for record in everything(place / "killed"))
    return f"killed at step 8 of 12 and continued ({attempts} attempts): weights differ by {most:.1e} at most from those of a whole run"


def run(*settings: str) -> None:
    done = subprocess.run(command(*settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(settings)}\n{done.stdout}")


def command(*settings: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *settings]


def exported(out: Path) -> Path:
    (path,) = out.glob("*/export/pytorch_lora_weights.safetensors")
    return path


def everything(out: Path) -> Iterator[dict]:
    (path,) = out.glob("*/journal.jsonl")
    return (record for _, record in read(path))


def records(out: Path) -> list[dict]:
    return [record for record in everything(out) if record["kind"] == "metrics"]


if __name__ == "__main__":
    hide_bitsandbytes()
    main()
