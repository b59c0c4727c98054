"""Training methods: which parameters train, and how they are attached to the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from trainer.core.settings import path_setting

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Method:
    """Base class of the method settings; an option overrides `attach`."""

    init_from: str | None = path_setting(None)
    """Weights to start from: a run, a folder that peft wrote, or a safetensors file."""

    freezes = False
    """Whether the network's own weights are frozen, so that the parameters beside them can be exported alone."""
    is_adapter = False
    """Whether the trainable parameters change the weights of layers."""
    reads_weights_outside_forward = False
    """Whether weights of the network are used outside of its forward passes."""
    formats: ClassVar[tuple[str, ...]] = ("pipeline", "single_file")
    """Names of the export formats that can hold the trained parameters; the first is the default."""

    @property
    def stochastic_rounding(self) -> bool:
        """Whether trainable weights are bfloat16 and updates are rounded stochastically, without a float32 copy."""
        return False

    def resolve(self, targets: tuple[str, ...]) -> Self:
        """Returns the settings with values in place of nulls. `targets` are the model's default layers for adapters."""
        return self

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        """Makes `network` trainable in place. `targets` are the model's default layers for adapters."""
        raise NotImplementedError

    def dtype(self, precision: torch.dtype) -> torch.dtype:
        """Returns the dtype in which the network is loaded, given the dtype of frozen weights."""
        return precision
