"""Adapters that are attached: what they are made of, what they do, and how they are written and read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from trainer.core import files
from trainer.core.errors import UsageError
from trainer.core.rng import normal

KINDS = {"lora_magnitude_vector": "dora", "lora_": "lora", "hada_": "loha", "lokr_": "lokr"}
"""How the tensors of a method begin, in a layer."""
SCALED = ("lora_B.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")
"""The tensor of each kind that takes a factor of the whole update."""

LEAVES = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector.weight",
}
"""Tensors as kohya's scripts call them, and as peft does."""
LENGTHS = ", lengths"


@dataclass(slots=True)
class Part:
    """What is attached to one layer: its tensors by their names there, and the factor (alpha / rank) of the update they make."""

    tensors: dict[str, torch.Tensor]
    scale: float

    def kind(self) -> str:
        return next(kind for start, kind in KINDS.items() if any(name.startswith(start) for name in self.tensors))

    def rank(self) -> int | None:
        """None where every factor is whole."""
        ranks = [tensor.shape[0] for name, tensor in self.tensors.items() if name.endswith(("lora_A.weight", "_b"))]
        return ranks[0] if ranks else None

    def with_scale(self, scale: float) -> dict[str, torch.Tensor]:
        """The tensors that make the same update times another factor."""
        return {
            name: tensor * (self.scale / scale) if name in SCALED else tensor for name, tensor in self.tensors.items()
        }


def layers(network: torch.nn.Module) -> Iterator[tuple[str, BaseTunerLayer, str]]:
    """Each adapted layer with its name and that of its adapter."""
    for name, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer):
            (active,) = layer.active_adapters
            yield name, layer, active


def parts(network: torch.nn.Module) -> dict[str, Part]:
    """What is attached to each adapted layer."""
    return {
        name: Part(
            {
                leaf.replace(f".{active}", "", 1): tensor
                for leaf, tensor in layer.named_parameters()
                if not leaf.startswith("base_layer.")
            },
            float(layer.scaling[active]),
        )
        for name, layer, active in layers(network)
    }


def of_trained(weights: dict[str, torch.Tensor], scale: float) -> dict[str, Part]:
    """The parts of an adapter whose weights have the names that they train by; what has other names is left out."""
    found: dict[str, Part] = {}
    for key, tensor in weights.items():
        if match := re.fullmatch(r"(.+)\.((?:lora|hada|lokr)_\w+)\.default(\.weight)?", key):
            name, leaf, end = match.groups(default="")
            found.setdefault(name, Part({}, scale)).tensors[leaf + end] = tensor
    return found


def adapter(network: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict]:
    """The attached adapter's weights in peft's names, and its configuration."""
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
    return PeftModel.from_pretrained(network, str(folder), torch_device="cpu", low_cpu_mem_usage=True).get_base_model()


def to_comfyui(found: dict[str, Part], export_name: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """An adapter as ComfyUI reads it, which asks no metadata: alpha lies beside each layer's tensors."""
    tensors = {}
    for name, part in found.items():
        if part.kind() == "lokr":
            # Readers take alpha for nothing where both factors are whole.
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in part.with_scale(1.0).items()}
        else:
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in part.tensors.items()}
            tensors[f"{name}.alpha"] = torch.tensor(part.scale * part.rank())
    return {export_name(key): tensor for key, tensor in tensors.items()}


def from_comfyui(
    tensors: dict[str, torch.Tensor], known: list[str], export_name: Callable[[str], str]
) -> dict[str, Part]:
    """An adapter in the names of ComfyUI, kohya's scripts or LyCORIS, with alpha beside each layer's tensors, -> its parts. `known` are the
    layers of the network; one that is not known keeps the name it has in the file."""
    real = {}
    for name in known:
        flat = name.replace(".", "_")
        names = {f"{start}{name}" for start in ("", "transformer.", "unet.", "diffusion_model.", "base_model.model.")}
        names |= {f"lora_unet_{flat}", f"lycoris_{flat}", export_name(f"{name}.alpha").removesuffix(".alpha")}
        real |= dict.fromkeys(names, name)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, leaf = re.fullmatch(r"(.*?)\.(\w+\.weight|\w+)", key).groups() if "." in key else (key, "")
        own = found.setdefault(real.get(name, name), {})
        own[LEAVES.get(leaf, leaf)] = tensor.flatten() if leaf == "dora_scale" else tensor
    made = {}
    for name, own in found.items():
        alpha = own.pop("alpha", None)
        part = made[name] = Part(own, 1.0)
        if alpha is not None and part.rank() is not None:
            part.scale = float(alpha) / part.rank()
    return made


def put(found: dict[str, Part], network: torch.nn.Module, source: object) -> None:
    """Begin the attached adapter with another, so that it does what that one does. Raises errors.UsageError where it is of another method, rank, or
    for other layers, with what to type."""
    own = parts(network)
    kinds, wanted = {part.kind() for part in found.values()}, next(iter(own.values())).kind()
    if kinds != {wanted}:
        raise UsageError(
            f"method.init_from={source} holds {' and '.join(sorted(kinds)) or 'no adapter'}; type method={min(kinds, default='full')}"
        )
    if others := sorted(found.keys() ^ own.keys()):
        lacking, unknown = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
        said = [
            f"{len(names)} {what} ({', '.join(names[:3])})"
            for names, what in ((lacking, "it lacks"), (unknown, "it has more"))
            if names
        ]
        raise UsageError(
            f"method.init_from={source} adapts other layers than method.targets, {len(others)} in all: {'; '.join(said)}. "
            f"Type method.targets=[{','.join(_endings(found, network))}]"
        )
    wrong = [
        name
        for name, part in found.items()
        if {leaf: tensor.shape for leaf, tensor in part.tensors.items()}
        != {leaf: tensor.shape for leaf, tensor in own[name].tensors.items()}
    ]
    if wrong:
        ranks = sorted({part.rank() for part in found.values()} - {None})
        remedy = (
            f"type method.rank={ranks[0]}" if len(ranks) == 1 else "one rank for all layers is what this program trains"
        )
        shapes = {leaf: tuple(tensor.shape) for leaf, tensor in found[wrong[0]].tensors.items()}
        raise UsageError(
            f"method.init_from={source} has {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks)) or 'none'} and other shapes than "
            f"method.rank={own[wrong[0]].rank()} gives {len(wrong)} of {len(own)} layers (of {wrong[0]} {shapes}); {remedy}"
        )
    with torch.no_grad():
        for name, part in found.items():
            for leaf, tensor in part.with_scale(own[name].scale).items():
                own[name].tensors[leaf].copy_(tensor)


def _endings(found: dict[str, Part], network: torch.nn.Module) -> list[str]:
    """The shortest ends of names that these layers have and no other module of the network has."""
    known, ends = [name for name, _ in network.named_modules()], set()
    for name in found:
        steps = name.split(".")
        for length in range(1, len(steps) + 1):
            end = ".".join(steps[-length:])
            if all(other in found for other in known if f".{other}".endswith(f".{end}")):
                break
        ends.add(end)
    return sorted(ends)


def lengths(weight: torch.Tensor) -> torch.Tensor:
    """|W| of each row (of a convolution: each kernel), (out,)."""
    return torch.linalg.norm(weight.float().flatten(1), dim=1)


def init_magnitudes(network: torch.nn.Module) -> None:
    """Begin DoRA's lengths at those of the frozen weights in float32. peft computes them in the weights' own type: in bfloat16 the network
    would not begin as it was."""
    for _, layer, active in layers(network):
        magnitude = layer.lora_magnitude_vector[active].weight
        magnitude.data = lengths(layer.get_base_layer().weight).reshape(magnitude.shape)


def is_noop(network: torch.nn.Module) -> bool:
    """Whether the attached adapter changes nothing."""
    for name, effect in probe_outputs(network).items():
        start = (
            lengths(network.get_submodule(name.removesuffix(LENGTHS)).get_base_layer().weight)
            if name.endswith(LENGTHS)
            else 0.0
        )
        if not torch.allclose(effect, effect.new_zeros(()) + start, rtol=1e-6, atol=0):
            return False
    return True


def probe_outputs(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the attached adapter adds to each adapted layer's output for a fixed random input: layer -> (rows, out) in float32; of DoRA before
    the rows of the sum take their lengths, which are there too, (out,).

    The weights of the layers themselves have no part in it, so a network without weights can be asked as well.
    """
    found = {}
    for name, layer, active in layers(network):
        if isinstance(layer, LoraLayer):
            down, up = _low_rank(layer, active)
            found[name] = _probe(name, down) @ down.T @ up.T * layer.scaling[active]
        else:
            update = layer.get_delta_weight(active).float().flatten(1)
            found[name] = _probe(name, update) @ update.T
        if (magnitude := _magnitude(layer, active)) is not None:
            found[name + LENGTHS] = magnitude
    return found


def _probe(name: str, weight: torch.Tensor) -> torch.Tensor:
    return normal((4, weight.shape[1]), "probe", name).to(weight.device)


def _low_rank(layer: LoraLayer, active: str) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA's A (rank, in) and B (out, rank), float32. Of a convolution the kernel is flattened; B's is 1 x 1."""
    return tuple(side[active].weight.float().flatten(1) for side in (layer.lora_A, layer.lora_B))


def _magnitude(layer: BaseTunerLayer, active: str) -> torch.Tensor | None:
    """DoRA's lengths, (out,) float32."""
    vectors = getattr(layer, "lora_magnitude_vector", {})
    return vectors[active].weight.float().flatten() if active in vectors else None


def frozen(network: torch.nn.Module, name: str) -> torch.Tensor:
    """The tensor `name` of the network as it was before an adapter was attached; of a quantised layer what its products see."""
    path, _, leaf = name.rpartition(".")
    layer = network.get_submodule(path)
    return getattr(getattr(layer, "base_layer", layer), leaf)


def merged(network: torch.nn.Module, name: str) -> torch.Tensor:
    """The tensor `name` of the network with what was trained in it; of an adapted layer in float32."""
    path, _, leaf = name.rpartition(".")
    layer = network.get_submodule(path)
    tensor = frozen(network, name)
    if leaf != "weight" or not isinstance(layer, BaseTunerLayer):
        return tensor
    (active,) = layer.active_adapters
    if isinstance(layer, LoraLayer):
        # Not peft's get_delta_weight: it rounds to the type of the adapter.
        down, up = _low_rank(layer, active)
        update = (up @ down).reshape(tensor.shape) * layer.scaling[active]
    else:
        update = layer.get_delta_weight(active).float()
    tensor = tensor.float() + update
    if (magnitude := _magnitude(layer, active)) is None:
        return tensor
    return tensor * (magnitude / lengths(tensor)).reshape(-1, *(1 for _ in tensor.shape[1:]))
