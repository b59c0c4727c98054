"""What trains: adapters beside frozen weights, or the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from trainer.errors import Usage
from trainer.streams import number

if TYPE_CHECKING:
    import torch


class Init(Enum):
    """Initial weights of LoRA's A: kaiming uniform (peft's default) or gaussian; B starts at zero in both."""

    kaiming = "kaiming"
    gaussian = "gaussian"


@dataclass(slots=True)
class Method:
    """`attach` makes `network` trainable in place. `init_from` names weights to start from: a run folder or a safetensors file."""

    init_from: str | None = None

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        raise NotImplementedError


@dataclass(slots=True)
class Lora(Method):
    """LoRA (Hu et al. 2021): W + alpha / rank * B A.

    `alpha` null is `alpha_per_rank` x rank, so that a sweep over ranks does not move the scale. `targets` null are the
    family's own.
    """

    rank: int = 16
    alpha: float | None = None
    alpha_per_rank: float = 1.0
    dropout: float = 0.0
    targets: list[str] | None = None
    init: Init = Init.kaiming

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise Usage(f"method.rank={self.rank} adapts nothing; type a rank of 1 or more, such as method.rank=16")
        if not 0 <= self.dropout < 1:
            raise Usage(f"method.dropout={self.dropout:g} is no probability below 1; type a number such as method.dropout=0.1")

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        network.requires_grad_(False)
        torch.manual_seed(number(seed, "adapter"))
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets or targets),
            init_lora_weights="gaussian" if self.init is Init.gaussian else True,
        )
        try:
            inject_adapter_in_model(config, network)
        except ValueError as error:
            raise Usage(f"method.targets={self.targets} name no layer of this model ({error}); the default is {list(targets)}") from error
        keep_trained_in_float32(network)


@dataclass(slots=True)
class Full(Method):
    """Every weight of the network trains."""

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        network.requires_grad_(True)
        keep_trained_in_float32(network)


def trained(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def keep_trained_in_float32(network: torch.nn.Module) -> None:
    """Updates of 1e-5 vanish when added to bfloat16 weights: 95 % of the entries would never change."""
    for parameter in trained(network).values():
        parameter.data = parameter.data.float()


def adapter(network: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict]:
    """The attached adapter's weights in peft's names, and its configuration."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(network), network.peft_config["default"].to_dict()


@contextmanager
def swapped(network: torch.nn.Module, weights: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """The network with other values for what trains (the moving average, say) for the length of a block."""
    if weights is None:
        yield
        return
    own = {name: parameter.data for name, parameter in trained(network).items()}
    try:
        for name, parameter in trained(network).items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in trained(network).items():
            parameter.data = own[name]


OPTIONS = {"lora": Lora, "full": Full}
