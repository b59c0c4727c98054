"""Measures the peak memory of training: `python peak_memory.py FOLDER FAMILY CONTROLS OVERRIDES...`.

It prints the growth of the resident memory, in bytes, from before the network is built to the end of two optimizer
steps. The kernel keeps its highest value (VmHWM in /proc/self/status, proc(5)), so nothing between two samples is
missed. Nothing of `trainer.forecast` is used. Before, the same steps run once, so that libraries are loaded and have
compiled their kernels for these shapes. glibc returns each block of 64 KiB and more to the kernel when it is freed
(`ALLOCATOR`), so that the resident memory is what is in use. CONTROLS is the number of control images.

FOLDER holds the checkpoint, which `save_large` has written.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Environment of the process."""


def save_large(folder: Path, family: str, changes: Mapping[str, Any]) -> None:
    """Writes a checkpoint with random weights: the tiny one of a family, with changes to the config of its denoiser."""
    import torch

    from trainer.config.groups import GROUPS
    from trainer.model.weights import required_tensors, save_shards

    kind: Any = GROUPS["model"][family]
    kind.save_tiny_checkpoint(folder)
    for file in (folder / kind.denoiser).glob("*.safetensors*"):
        file.unlink()
    path = folder / kind.denoiser / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    shapes = {name: tensor.shape for name, tensor in required_tensors(kind(path=str(folder)).meta_model()).items()}
    tensors = ((name, torch.randn(shape) * 0.02) for name, shape in shapes.items())
    save_shards(tensors, folder / kind.denoiser)


def status(key: str) -> int:
    """Returns a value of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def train(overrides: list[str], controls: int) -> None:
    """Trains two steps on random numbers."""
    import torch

    from trainer.config.compose import compose_config, to_run
    from trainer.core.batch import Batch
    from trainer.method.trainable import set_train_mode, trainable_parameters
    from trainer.training.build import build_network
    from trainer.training.loop import TrainingLoop
    from trainer.training.predictor import Predictor

    device = torch.device("cpu")
    run = to_run(compose_config(overrides))
    network = build_network(run, device)
    parameters = list(trainable_parameters(network).values())
    set_train_mode(network)
    size = run.dataset.size()
    assert size is not None and run.batch is not None
    width, height = size
    shapes = run.model.shapes(height, width, [(height, width)] * controls)
    dtype = run.model.encoder_dtype.torch

    def batches() -> Iterator[tuple[int, list[Batch]]]:
        count = run.hardware.micro_batch_for(run.batch, sum(p.numel() for p in network.parameters()))
        for step in (1, 2):
            micro_batches = []
            for _ in range(run.batch // count):
                batch = {name: torch.ones(count, *shape, dtype=dtype) for name, shape in shapes.items()}
                batch.pop("latents_std", None)
                batch["latents"] = torch.randn(count, *shapes["latents"])
                batch["noise"], batch["t"] = torch.randn_like(batch["latents"]), torch.rand(count)
                micro_batches.append(batch)
            yield step, micro_batches

    loop = TrainingLoop(
        parameters=parameters,
        losses=Predictor(run, network, device).losses,
        optimizer=run.optimizer.build(parameters, run.seed),
        learning_rate=lambda step: 1e-6,
        batch_size=run.batch,
        max_grad_norm=1.0,
        seed=0,
        loss_scale=run.precision.loss_scale(),
    )
    for _ in loop.steps(batches()):
        pass


def main() -> None:
    import torch

    folder, family, controls, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    settings = [f"model={family}", "tracking=none", *overrides]
    train([*settings, f"model.path={folder}"], int(controls))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is in use
    before = status("VmRSS")
    train([*settings, f"model.path={folder}"], int(controls))
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main()
