"""Measures the memory of a training step for each storage of the frozen weights, and the error of each storage.

`python bench/precision.py` prints two tables in about two minutes. The model is a FLUX of 203 M parameters with random
weights and a LoRA of rank 16 on its attention; a step has 160 tokens. Each row is measured in a process of its own with
one thread, as the growth of the process since before the network was loaded.
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
        print(json.dumps(measure(arguments.folder, storage, checkpointing == "True")))
        return
    with tempfile.TemporaryDirectory() as temporary:
        save_model(Path(temporary))
        # Freed memory is returned to the system at once, so that the size of the process is the memory in use.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "0",
        }
        results = {}
        for storage, checkpointing in ROWS:
            command = [sys.executable, __file__, "--folder", temporary, "--child", storage, str(checkpointing)]
            text = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[storage, checkpointing] = json.loads(text.splitlines()[-1])
    print(
        "| storage | checkpointing | weights, MiB | peak of loading, MiB | peak of a step, MiB | step / bf16 | loss |\n"
        "|---|---|---|---|---|---|---|"
    )
    for (storage, checkpointing), row in results.items():
        ratio = row["step"] / results["bf16", checkpointing]["step"]
        values = f"{row['weights']:.0f} | {row['load']:.0f} | {row['step']:.0f} | {ratio:.2f} | {row['loss']:.5f}"
        print(f"| {storage} | {'yes' if checkpointing else 'no'} | {values} |")
    print()
    print_errors()


def save_model(folder: Path) -> None:
    """Saves a checkpoint of random bfloat16 weights."""
    import torch

    # Imported before diffusers, from which it hides bitsandbytes.
    from trainer.model.pretrained import quiet_libraries

    quiet_libraries()
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    FluxTransformer2DModel(**SIZE).save_pretrained(folder / "transformer")


def measure(folder: Path, storage: str, checkpointing: bool) -> dict[str, float]:
    """Returns MiB of the weights, at the peak of loading and at the peak of a step, and the loss of the second step."""
    import torch

    from trainer.core.dtypes import Dtype
    from trainer.method.lora import Lora
    from trainer.method.trainable import trainable_parameters
    from trainer.model.flux_kontext import FluxKontext
    from trainer.precision import Precision, Storage

    for library in ("diffusers.models.transformers.transformer_flux", "peft"):
        importlib.import_module(library)
    torch.set_num_threads(1)
    family, precision = FluxKontext(path=str(folder)), Precision(Storage[storage], Dtype.bfloat16)
    device = torch.device("cpu")
    before = resident_memory()
    with sample_memory() as samples:
        network = family.load_network(
            precision.dtype(), device, precision.quantizer(family.unquantized_modules, device)
        )
    for parameter in network.parameters():
        # Loaded weights are pages of the mapped file, which the system may drop at any time.
        parameter.data = parameter.data.clone()
    Lora(rank=16, alpha=16.0).attach(network, family.target_modules, seed=0)
    if checkpointing:
        network.enable_gradient_checkpointing()
    parameters = list(trainable_parameters(network).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    latents, control = (torch.randn(1, 16, 16, 16, generator=generator) for _ in range(2))
    conditions = {
        "control": control,
        "prompt": torch.randn(1, 32, 256, generator=generator),
        "pooled": torch.randn(1, 64, generator=generator),
    }
    for _ in range(2):
        # The first step is not measured: libraries initialize themselves in it.
        gc.collect()
        reset_peak_memory()
        with precision.autocast(device):
            loss = (family.predict(network, latents, torch.tensor([0.5]), conditions).float() - latents).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    return {
        "weights": weights / MIB,
        "load": max(samples) - before,
        "step": peak_memory() - before,
        "loss": loss.item(),
    }


def print_errors() -> None:
    """Prints the relative error |W' - W| / |W| of stored weights, for normal weights W with and without outliers."""
    import torch

    from trainer.precision import Precision, Storage

    storages = ("fp8", "int8", "nf4", "fp4")
    print(f"| weights | bare cast to fp8 | {' | '.join(storages)} |\n|{'---|' * (len(storages) + 2)}")
    torch.manual_seed(0)
    for deviation, outliers in ((0.1, 0.0), (0.02, 0.0), (0.005, 0.0), (0.02, 1e-3)):
        weight = torch.randn(2048, 2048) * deviation
        weight[torch.rand_like(weight) < outliers] *= 10
        stored = [weight.to(torch.float8_e4m3fn).float()]
        for storage in storages:
            layer = torch.nn.Linear(2048, 2048, bias=False, device="meta")
            stored.append(
                Precision(Storage[storage])
                .quantizer((), torch.device("cpu"))("", layer, lambda name, weight=weight: weight)
                .weight
            )
        errors = " | ".join(f"{((each - weight).norm() / weight.norm()).item():.4f}" for each in stored)
        print(f"| normal, {deviation}{', a thousandth of them 10 times as large' if outliers else ''} | {errors} |")


def resident_memory() -> float:
    """Returns the MiB that this process holds, without pages of mapped files, which the system can drop."""
    return memory_status("RssAnon")


@contextmanager
def sample_memory() -> Iterator[list[float]]:
    """Measures `resident_memory` every two milliseconds; yields the list of measurements."""
    samples, done = [resident_memory()], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(resident_memory())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    return memory_status("VmHWM") - memory_status("RssFile") - memory_status("RssShmem")


def memory_status(name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


if __name__ == "__main__":
    main()
