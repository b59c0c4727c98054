"""What trains: adapters beside frozen weights, or the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from trainer.core.errors import UsageError
from trainer.core.rng import seed_for
from trainer.distributed.sharding import is_part

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


ADAPTER_FORMATS = ("diffusers", "peft", "comfyui")


class Init(Enum):
    """Initial weights of LoRA's A: kaiming uniform (peft's default) or gaussian; B starts at zero in both."""

    kaiming = "kaiming"
    gaussian = "gaussian"


class LokrInit(Enum):
    """Which factor of LoKr starts at zero: the small one (peft's default), or the large one as in LyCORIS."""

    peft = "peft"
    lycoris = "lycoris"


class Master(Enum):
    """What a bfloat16 weight's updates are added to: a float32 copy, which it is itself while it trains; or the weight, by chance rounded."""

    fp32 = "fp32"
    none = "none"


@dataclass(slots=True)
class Method:
    """`attach` makes `network` trainable in place. `init_from` names weights to start from: a run, a peft folder or a safetensors file."""

    init_from: str | None = None

    freezes = False
    """Whether the network's own weights stay as they are, so that what trains beside them can be exported alone."""
    is_adapter = False
    """Whether what trains changes the weights of layers."""
    reads_inside = False
    """Whether weights of the network are used outside of its forward passes."""
    formats = ("pipeline",)
    """Names of the export formats that hold what trains; the first is written where none is asked for."""

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        raise NotImplementedError

    def dtype(self, precision: torch.dtype) -> torch.dtype:
        """The type in which the network is loaded, where its frozen weights are to be of type `precision`."""
        return precision


@dataclass(slots=True)
class Adapter(Method):
    """A product of small matrices added to the weights of some layers, times alpha / rank.

    `alpha` null is `alpha_per_rank` x rank, so that a sweep over ranks does not move the scale. `targets` null are the
    family's own.
    """

    rank: int = 16
    alpha: float | None = None
    alpha_per_rank: float = 1.0
    targets: list[str] | None = None

    freezes = True
    is_adapter = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(
                f"method.rank={self.rank} adapts nothing; type a rank of 1 or more, such as method.rank=16"
            )
        for name in ("dropout", "rank_dropout", "module_dropout"):
            value = getattr(self, name, 0.0)
            if not 0 <= value < 1:
                raise UsageError(
                    f"method.{name}={value:g} is no probability below 1; type a number such as method.{name}=0.1"
                )

    def configuration(self, targets: list[str]) -> PeftConfig:
        """peft's settings of this adapter."""
        raise NotImplementedError

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        import torch
        from peft import inject_adapter_in_model

        network.requires_grad_(False)
        torch.manual_seed(seed_for(seed, "adapter"))
        try:
            inject_adapter_in_model(self.configuration(list(self.targets or targets)), network)
        except ValueError as error:
            raise UsageError(
                f"method.targets={self.targets} name no layer of this model ({error}); the default is {list(targets)}"
            ) from error
        keep_trained_in_float32(network)


@dataclass(slots=True)
class Lora(Adapter):
    """LoRA (Hu et al. 2021): W + alpha / rank * B A."""

    dropout: float = 0.0
    init: Init = Init.kaiming

    formats = (*ADAPTER_FORMATS, "pipeline")

    def configuration(self, targets: list[str]) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            init_lora_weights="gaussian" if self.init is Init.gaussian else True,
        )


@dataclass(slots=True)
class Dora(Lora):
    """DoRA (Liu et al. 2024): rows of W + alpha / rank * B A at lengths of their own, m (W + ...) / |W + ...|; m starts at |W|."""

    # ComfyUI divides by |W| alone, and so would draw with other weights than those that were trained.
    formats = ("diffusers", "peft", "pipeline")

    def configuration(self, targets: list[str]) -> PeftConfig:
        configuration = Lora.configuration(self, targets)
        configuration.use_dora = True
        return configuration

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        from trainer.method.adapter import init_magnitudes

        Lora.attach(self, network, targets, seed)
        init_magnitudes(network)


@dataclass(slots=True)
class Loha(Adapter):
    """LoHa (Hyeon-Woo et al. 2022): W + alpha / rank * (B1 A1) * (B2 A2), entry by entry, so that the update has up to rank^2 as its rank.

    The dropouts leave out rows of the update, and the updates of whole layers.
    """

    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    formats = ("comfyui", "peft", "pipeline")

    def configuration(self, targets: list[str]) -> PeftConfig:
        from peft import LoHaConfig

        return LoHaConfig(
            r=self.rank,
            alpha=self.alpha,
            rank_dropout=self.rank_dropout,
            module_dropout=self.module_dropout,
            target_modules=targets,
        )


@dataclass(slots=True)
class Lokr(Loha):
    """LoKr (Yeh et al. 2024): W + alpha / rank * (C kron (B A)), with C as large as `decompose_factor` says (-1: near the square root of a
    side). A factor whose side is no more than twice the rank is whole; `decompose_both` makes C a product of low rank too.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    init: LokrInit = LokrInit.peft

    def __post_init__(self) -> None:
        Loha.__post_init__(self)
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise UsageError(
                f"method.decompose_factor={self.decompose_factor} divides no side; type 2 or more, or -1 for one near the square root"
            )

    def configuration(self, targets: list[str]) -> PeftConfig:
        from peft import LoKrConfig

        return LoKrConfig(
            r=self.rank,
            alpha=self.alpha,
            rank_dropout=self.rank_dropout,
            module_dropout=self.module_dropout,
            decompose_both=self.decompose_both,
            decompose_factor=self.decompose_factor,
            init_weights="lycoris" if self.init is LokrInit.lycoris else True,
            target_modules=targets,
        )


@dataclass(slots=True)
class SoftPrompt(Method):
    """What a frozen language model is told beside its text; see trainer.method.soft_prompt.

    `num_image_prompt` learnt embeddings stand behind the text, `num_prefix_prompt` learnt keys and values before it in every layer; with
    `prefix_projection` those come out of two layers, the first `prefix_width` wide, in place of being learnt as they are.
    """

    num_image_prompt: int = 2
    num_prefix_prompt: int = 2
    prefix_projection: bool = False
    prefix_width: int = 64

    freezes = True
    reads_inside = True
    formats = ("soft_prompt",)

    def __post_init__(self) -> None:
        if self.num_image_prompt < 1:
            raise UsageError(
                f"method.num_image_prompt={self.num_image_prompt} leaves nothing to draw from; type 1 or more, such as 2"
            )
        if self.num_prefix_prompt < 0:
            raise UsageError(
                f"method.num_prefix_prompt={self.num_prefix_prompt} is no number of positions; type 0 for none, or 2"
            )
        if self.prefix_width < 1:
            raise UsageError(
                f"method.prefix_width={self.prefix_width} is no width of a layer; type 64 or another number from 1"
            )

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        network.requires_grad_(False)
        network.soft_prompt = self.begun(network, seed)

    def begun(self, network: torch.nn.Module, seed: int) -> torch.nn.Module:
        """The soft prompt as training begins with it, for a network with `prompt_sizes`."""
        import torch

        from trainer.method.soft_prompt import Reader, SoftPrompt

        device = next(network.parameters()).device
        torch.manual_seed(seed_for(seed, "adapter"))
        reader, width = Reader(**network.prompt_sizes), self.prefix_width if self.prefix_projection else None
        return SoftPrompt(reader, self.num_image_prompt, self.num_prefix_prompt, width).to(device)


@dataclass(slots=True)
class Full(Method):
    """Every weight of the network trains."""

    master_weights: Master = Master.fp32

    def attach(self, network: torch.nn.Module, targets: tuple[str, ...], seed: int) -> None:
        network.requires_grad_(True)
        if self.master_weights is Master.fp32:
            keep_trained_in_float32(network)

    def dtype(self, precision: torch.dtype) -> torch.dtype:
        import torch

        # Not rounded on the way there.
        return torch.float32 if self.master_weights is Master.fp32 else precision


def trained(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def keep_trained_in_float32(network: torch.nn.Module) -> None:
    """Updates of 1e-5 vanish when added to bfloat16 weights: 95 % of the entries would never change."""
    for parameter in trained(network).values():
        parameter.data = parameter.data.float()


@contextmanager
def swapped(network: torch.nn.Module, weights: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """The network with other values for what trains (the moving average, say) for the length of a block."""
    if weights is None:
        yield
        return
    own = {
        name: parameter.data.clone() if is_part(parameter) else parameter.data
        for name, parameter in trained(network).items()
    }

    def put(values: dict[str, torch.Tensor]) -> None:
        for name, parameter in trained(network).items():
            if is_part(parameter):
                # It has its place in the memory that torch puts blocks together from.
                parameter.data.copy_(values[name])
            else:
                parameter.data = values[name]

    try:
        put(weights)
        yield
    finally:
        put(own)


OPTIONS = {"lora": Lora, "dora": Dora, "lokr": Lokr, "loha": Loha, "full": Full, "soft_prompt": SoftPrompt}
