"""Facts of a machine and how to use it: how fast a run goes, never what it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError

if TYPE_CHECKING:
    import torch

GIB = 1024**3


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


@dataclass(slots=True)
class Card:
    """What a device is and can do; null is not known before it is open."""

    name: str | None = None
    memory_gib: float | None = None
    """Of a Mac, all it has: CPU and GPU share it."""
    compute_capability: float | None = None
    """NVIDIA's number of what a card can do, 8.9 for example; null for others."""
    bfloat16: bool | None = None
    """Whether training in bfloat16 is worth it and right."""
    float16: bool | None = None
    float8: bool | None = None
    """Whether it multiplies float8. Where it does not, float8 still stores."""
    bitsandbytes: bool | None = None
    """Whether its 8-bit optimizers and 4-bit weights run on it."""


@dataclass(slots=True)
class Hardware:
    """`micro_batch` is a ceiling on samples per forward pass; null leaves it to `micro_batch_for`. `card` are facts to be refused by, the
    rest is how to use it."""

    card: Card = field(default_factory=Card)
    device: Device = Device.auto
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    workers: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UsageError(
                f"hardware.micro_batch={self.micro_batch} holds no sample; type 1 or more, or null to leave it to the program"
            )
        if self.workers < 0:
            raise UsageError(
                f"hardware.workers={self.workers} is no number of processes; type 0 to load in the main process, or more"
            )

    def open(self) -> torch.device:
        """The device of the run; a device asked for by name that is not there is refused."""
        import torch

        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = self.device.value
        if name == "auto":
            name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
        if not there[name]:
            raise UsageError(
                f"hardware.device={name}: this machine has no such device that torch {torch.__version__} can use; type hardware.device=auto"
            )
        return torch.device(name)

    def micro_batch_for(self, batch: int, parameters: int) -> int:
        """Samples per forward pass. Without a forecast of memory: the whole batch for a network of up to ten million parameters, else 1."""
        if self.micro_batch is not None:
            return min(batch, self.micro_batch)
        return batch if parameters <= 10_000_000 else 1


def card(device: torch.device) -> Card:
    """The facts of an open device."""
    import torch

    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability = found.major + found.minor / 10
        # developer.nvidia.com/cuda-gpus; TransformerEngine's support matrix: bfloat16 from 8.0, float8 from 8.9
        return Card(found.name, found.total_memory / GIB, capability, capability >= 8.0, True, capability >= 8.9, True)
    if device.type == "mps":
        # float16 trained to NaN; bfloat16 needs macOS 14 and is no faster than float32; see conf/hardware/m2_max.yaml
        return Card("Apple GPU", torch.mps.recommended_max_memory() / GIB, None, False, False, False, False)
    return Card("CPU", _total() / GIB, None, True, False, False, True)


def memory(device: torch.device) -> dict[str, float]:
    """Memory in use in GiB: this process's resident set, and what torch holds of an accelerator with its peak."""
    import torch

    used = {"system/memory_gib": _resident() / GIB}
    if device.type == "cuda":
        used["system/device_memory_gib"] = torch.cuda.memory_allocated() / GIB
        used["system/device_memory_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    elif device.type == "mps":
        used["system/device_memory_gib"] = torch.mps.current_allocated_memory() / GIB
    return used


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _total() -> int:
    import psutil

    return psutil.virtual_memory().total


OPTIONS = dict.fromkeys(
    ("auto", "cpu", "m2_max", "rtx3060", "t4", "rtx3090", "rtx4090", "a100_40g", "a100_80g", "h200"),
    Hardware,
)
