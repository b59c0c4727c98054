"""What trains: adapters beside frozen weights, or the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import files
from trainer.errors import Usage
from trainer.streams import normal, number

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

    is_adapter = False
    """Whether what trains lies beside the network's own weights, so that it can be exported alone."""

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

    is_adapter = True

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

    configuration = network.peft_config["default"].to_dict()
    # A set has another order in every process, and so would the file have other bytes.
    configuration["target_modules"] = sorted(configuration["target_modules"])
    return get_peft_model_state_dict(network), configuration


def save_adapter(weights: dict[str, torch.Tensor], configuration: dict, folder: Path) -> None:
    """Write an adapter as `peft.PeftModel.from_pretrained(network, folder)` reads it. Raises OSError."""
    files.write_json(folder / "adapter_config.json", configuration | {"inference_mode": True})
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    files.save_tensors(folder / "adapter_model.safetensors", prefixed, {"format": "pt"})


def load_adapter(network: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """`network` with the adapter of a folder in it, by peft's own loader."""
    from peft import PeftModel

    return PeftModel.from_pretrained(network, str(folder), torch_device="cpu", low_cpu_mem_usage=True).get_base_model()


def effects(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the attached adapter adds to each adapted layer's output for a fixed random input: layer -> (rows, out) in float32.

    The weights of the layers themselves have no part in it, so a network without weights can be asked as well.
    """
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            (active,) = layer.active_adapters
            # Of a convolution the kernel is flattened; B's is 1 x 1.
            down, up = (side[active].weight.float().flatten(1) for side in (layer.lora_A, layer.lora_B))
            probe = normal((4, down.shape[1]), "probe", name).to(down.device)
            found[name] = probe @ down.T @ up.T * layer.scaling[active]
    return found


def frozen(network: torch.nn.Module, name: str) -> torch.Tensor:
    """The tensor `name` of the network as it was before an adapter was attached; of a quantised layer what its products see."""
    path, _, leaf = name.rpartition(".")
    layer = network.get_submodule(path)
    return getattr(getattr(layer, "base_layer", layer), leaf)


def merged(network: torch.nn.Module, name: str) -> torch.Tensor:
    """The tensor `name` of the network with what was trained in it; of an adapted layer W + alpha / rank * B A in float32."""
    path, _, leaf = name.rpartition(".")
    layer = network.get_submodule(path)
    tensor = frozen(network, name)
    if leaf != "weight" or not hasattr(layer, "base_layer"):
        return tensor
    (active,) = layer.active_adapters
    return tensor.float() + layer.get_delta_weight(active)


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
