"""The forecast of a run: memory, time and disk space, from the settings and the sizes of the images alone.

Nothing is fitted to measurements. The code that trains runs once on tensors that have shapes but no values (torch's
`FakeTensorMode`), and the storages that it keeps alive are counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

GIB = 2**30


@dataclass(slots=True, frozen=True)
class Memory:
    """The peak of one phase by part, in bytes."""

    weights: int = 0
    """Weights of the network that do not train."""
    trained: int = 0
    """Weights that train: those of the adapter, or of the whole network."""
    gradients: int = 0
    optimizer: int = 0
    """State of the optimizer, and the average of the weights."""
    encoders: int = 0
    """Weights of the VAE and the text encoders."""
    activations: int = 0
    """What the forward pass keeps for the backward pass."""
    work_space: int = 0
    """The rest of the peak."""
    context: int = 0
    """What CUDA takes without any tensor; on a CPU, the program and its libraries."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(slots=True, frozen=True)
class Time:
    """What a run computes, and how long that takes at the rates of the card.

    The times are lower bounds; see `trainer.forecast.rates.seconds`. They are None if the rates are unknown.
    """

    step_flops: int
    """Floating-point operations of an optimizer step; a multiply-add counts as two."""
    step_seconds: float | None
    evaluation_seconds: float | None
    """Of all evaluations of the run."""
    run_seconds: float | None
    """Of all steps and evaluations. Encoding is left out."""


@dataclass(slots=True, frozen=True)
class Disk:
    """Files that a run writes, in bytes."""

    cache: int
    """Entries that the cache lacks."""
    checkpoints: int
    exports: int


@dataclass(slots=True, frozen=True)
class Forecast:
    """The forecast of one run."""

    parameters: int
    """Number of parameters of the network, with those of the method."""
    trained_parameters: int
    memory: dict[str, Memory]
    """By phase: caching (if the cache lacks entries), training, evaluation, drawing (of images for an evaluation)."""
    time: Time
    disk: Disk
    micro_batch: int
    """Samples in a forward pass of training."""
    micro_batches: int
    """Number of them in a step."""
    card: str
    available: int | None
    """Memory of the card; None if unknown."""

    @property
    def largest(self) -> str:
        """The phase with the largest peak."""
        return max(self.memory, key=lambda phase: self.memory[phase].total)

    @property
    def peak(self) -> int:
        """The largest peak of all phases."""
        return self.memory[self.largest].total

    @property
    def fits_after_caching(self) -> bool:
        """Whether only the encoders do not fit, which are needed to fill the cache."""
        others = [memory.total for phase, memory in self.memory.items() if phase != "caching"]
        return self.fits is False and self.available is not None and max(others) <= self.available

    @property
    def fits(self) -> bool | None:
        """Whether all phases fit into the memory of the card; None if that is unknown."""
        return None if self.available is None else self.peak <= self.available
