"""Hardware profiles. They decide how fast a run goes, and never what it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError

if TYPE_CHECKING:
    import torch

SMALL_NETWORK = 10_000_000
"""Number of parameters up to which a network needs little memory."""


class Device(Enum):
    """Type of device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


@dataclass(slots=True)
class Card:
    """Capabilities of a device. Null: unknown until the device is opened."""

    name: str | None = None
    memory_gib: float | None = None
    """On a Mac, all of its memory, which CPU and GPU share."""
    compute_capability: float | None = None
    """NVIDIA's compute capability, for example 8.9; null for other devices."""
    bfloat16: bool | None = None
    """Whether training in bfloat16 works and is not slow."""
    float16: bool | None = None
    """Whether training in float16 works and is not slow."""
    float8: bool | None = None
    """Whether the device can multiply float8 numbers. Every device can store them."""
    bitsandbytes: bool | None = None
    """Whether the 8-bit optimizers and 4-bit weights of bitsandbytes run on the device."""
    bandwidth: float | None = None
    """Peak rate at which memory is read, in GB/s."""
    tflops: dict[str, float] = field(default_factory=dict)
    """Peak rate of dense matrix products by the name of their dtype, in 10^12 operations per second. Products of 16-bit
    numbers are summed in float32."""


@dataclass(slots=True)
class Hardware:
    """A hardware profile: what the card can do, which `trainer.config` checks, and how to use it."""

    card: Card = field(default_factory=Card)
    device: Device = Device.auto
    micro_batch: int | None = None
    """Largest number of samples in a forward pass; null: see `micro_batch_for`."""
    gradient_checkpointing: bool = False
    workers: int = 0
    """Number of processes that load data; 0: the main process loads it."""
    compile: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UsageError(
                f"hardware.micro_batch={self.micro_batch} holds no sample; type 1 or more, or null for the default"
            )
        if self.workers < 0:
            raise UsageError(
                f"hardware.workers={self.workers} must not be negative; type 0 to load in the main process, or more"
            )

    def open(self) -> torch.device:
        """Returns the device of the run. Raises errors.UsageError if this machine does not have it."""
        import torch

        available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = self.device.value
        if name == "auto":
            name = next(device for device in ("cuda", "mps", "cpu") if available[device])
        if not available[name]:
            raise UsageError(
                f"hardware.device={name}: torch {torch.__version__} finds no such device on this machine; "
                "type hardware.device=auto"
            )
        return torch.device(name)

    def micro_batch_for(self, batch: int, parameters: int) -> int:
        """Returns the number of samples in a forward pass of a network with this many parameters.

        Without `micro_batch` it is the whole batch for networks of up to `SMALL_NETWORK`, and 1 for larger ones.
        """
        if self.micro_batch is not None:
            return min(batch, self.micro_batch)
        return batch if parameters <= SMALL_NETWORK else 1
