"""Facts of a machine and how to use it: how fast a run goes, never what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from trainer.errors import Usage

if TYPE_CHECKING:
    import torch


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


@dataclass(slots=True)
class Hardware:
    """`micro_batch` is a ceiling on samples per forward pass; null leaves it to `micro_batch_for`."""

    device: Device = Device.auto
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    workers: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise Usage(f"hardware.micro_batch={self.micro_batch} holds no sample; type 1 or more, or null to leave it to the program")
        if self.workers < 0:
            raise Usage(f"hardware.workers={self.workers} is no number of processes; type 0 to load in the main process, or more")

    def open(self) -> torch.device:
        """The device of the run; a device asked for by name that is not there is refused."""
        import torch

        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = self.device.value
        if name == "auto":
            name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
        if not there[name]:
            raise Usage(
                f"hardware.device={name}: this machine has no such device that torch {torch.__version__} can use; type hardware.device=auto"
            )
        return torch.device(name)

    def micro_batch_for(self, batch: int, parameters: int) -> int:
        """Samples per forward pass. Without a forecast of memory: the whole batch for a network of up to ten million parameters, else 1."""
        if self.micro_batch is not None:
            return min(batch, self.micro_batch)
        return batch if parameters <= 10_000_000 else 1


def memory(device: torch.device) -> dict[str, float]:
    """Memory in use in GiB: this process's resident set, and what torch holds of an accelerator with its peak."""
    import torch

    gib = 1024**3
    used = {"system/memory_gib": _resident() / gib}
    if device.type == "cuda":
        used["system/device_memory_gib"] = torch.cuda.memory_allocated() / gib
        used["system/device_memory_peak_gib"] = torch.cuda.max_memory_allocated() / gib
    elif device.type == "mps":
        used["system/device_memory_gib"] = torch.mps.current_allocated_memory() / gib
    return used


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


OPTIONS = {"auto": Hardware, "cpu": Hardware}
