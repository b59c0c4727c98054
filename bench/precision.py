"""Memory of a training step by how the frozen weights are stored, and how exact that is.

`python bench/precision.py` prints two tables (a FLUX of 203 M parameters with random weights, LoRA of rank 16 on its attention, 160 tokens,
one thread, each row a process of its own; two minutes). A process is measured by what it grew since before the network was loaded.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROWS = [
    (storage, checkpointing) for checkpointing in (False, True) for storage in ("bf16", "fp8", "int8", "nf4", "fp4")
]
SIZE = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 8,
    "attention_head_dim": 64,
    "num_attention_heads": 16,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (8, 28, 28),
}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("STORAGE", "CHECKPOINTING"))
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        storage, checkpointing = arguments.child
        print(json.dumps(measured(arguments.folder, storage, checkpointing == "True")))
        return
    with tempfile.TemporaryDirectory() as temporary:
        make(Path(temporary))
        # Freed memory goes back at once, so that the process is as large as what it holds.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "0",
        }
        found = {}
        for storage, checkpointing in ROWS:
            command = [sys.executable, __file__, "--folder", temporary, "--child", storage, str(checkpointing)]
            text = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[storage, checkpointing] = json.loads(text.splitlines()[-1])
    print(
        "| storage | checkpointing | weights MiB | peak while loading MiB | peak of a step MiB | over bf16 | loss |\n|---|---|---|---|---|---|---|"
    )
    for (storage, checkpointing), row in found.items():
        ratio = row["step"] / found["bf16", checkpointing]["step"]
        values = f"{row['weights']:.0f} | {row['load']:.0f} | {row['step']:.0f} | {ratio:.2f} | {row['loss']:.5f}"
        print(f"| {storage} | {'yes' if checkpointing else 'no'} | {values} |")
    print()
    exactness()


def make(folder: Path) -> None:
    """A checkpoint of random bfloat16 weights."""
    import torch

    import trainer.model  # before diffusers, from which it hides bitsandbytes

    trainer.model.quiet_libraries()
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    FluxTransformer2DModel(**SIZE).save_pretrained(folder / "transformer")


def measured(folder: Path, storage: str, checkpointing: bool) -> dict[str, float]:
    """MiB of weights, at the peak of loading and of a step, and the loss of the second step."""
    import torch

    from trainer.method import Lora, trained
    from trainer.model.flux_kontext import FluxKontext
    from trainer.precision import Compute, Precision, Storage

    for library in ("diffusers.models.transformers.transformer_flux", "peft"):
        importlib.import_module(library)
    torch.set_num_threads(1)
    family, precision = FluxKontext(path=str(folder)), Precision(Storage[storage], Compute.bfloat16)
    device = torch.device("cpu")
    before = resident()
    with sampled() as seen:
        network = family.network(precision.dtype(), device, precision.stored(family.keep_high, device))
    for parameter in network.parameters():
        # Loaded weights lie in the mapped file, whose pages come and go.
        parameter.data = parameter.data.clone()
    Lora(rank=16, alpha=16.0).attach(network, family.targets, seed=0)
    if checkpointing:
        network.enable_gradient_checkpointing()
    parameters = list(trained(network).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    x, control = (torch.randn(1, 16, 16, 16, generator=generator) for _ in range(2))
    cond = {
        "control": control,
        "prompt": torch.randn(1, 32, 256, generator=generator),
        "pooled": torch.randn(1, 64, generator=generator),
    }
    for _ in range(2):
        # The first step is not measured: libraries set themselves up in it.
        gc.collect()
        reset_peak()
        with precision.autocast(device):
            loss = (family.predict(network, x, torch.tensor([0.5]), cond).float() - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    return {"weights": weights / MIB, "load": max(seen) - before, "step": peak() - before, "loss": loss.item()}


def exactness() -> None:
    """Relative error of the stored weights, |W' - W| / |W|, for normal weights of some standard deviations, and with outliers among them."""
    import torch

    from trainer.precision import Precision, Storage

    kinds = ("fp8", "int8", "nf4", "fp4")
    print(f"| weights | bare cast to fp8 | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 2)}")
    torch.manual_seed(0)
    for deviation, outliers in ((0.1, 0.0), (0.02, 0.0), (0.005, 0.0), (0.02, 1e-3)):
        weight = torch.randn(2048, 2048) * deviation
        weight[torch.rand_like(weight) < outliers] *= 10
        found = [weight.to(torch.float8_e4m3fn).float()]
        for kind in kinds:
            layer = torch.nn.Linear(2048, 2048, bias=False, device="meta")
            found.append(
                Precision(Storage[kind])
                .stored((), torch.device("cpu"))("", layer, lambda name, weight=weight: weight)
                .weight
            )
        errors = " | ".join(f"{((each - weight).norm() / weight.norm()).item():.4f}" for each in found)
        print(f"| normal, {deviation}{', a thousandth of them ten times as large' if outliers else ''} | {errors} |")


def resident() -> float:
    """MiB that this process holds; pages of mapped files, which can be dropped, left out."""
    return status("RssAnon")


@contextmanager
def sampled() -> Iterator[list[float]]:
    """What `resident` was every two milliseconds."""
    seen, done = [resident()], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            seen.append(resident())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    return status("VmHWM") - status("RssFile") - status("RssShmem")


def status(name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


if __name__ == "__main__":
    main()
