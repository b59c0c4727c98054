"""Starting an adapter from another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from trainer.core.errors import UsageError
from trainer.method.adapter import Adapter
from trainer.method.adapter_layers import layer_adapters
from trainer.method.layer_adapter import LayerAdapter

Shapes = dict[str, tuple[int, ...]]


def load_into(
    adapters: dict[str, LayerAdapter], network: torch.nn.Module, method: Adapter, source: object = None
) -> None:
    """Copies `adapters` (by the name of the layer) into the adapter of `method` that is attached to the network.

    The effect stays the same even if alpha differs. Raises errors.UsageError, which says what to type, if the methods,
    ranks or layers differ. `source` names `adapters` in the message; None: `method.init_from`.
    """
    source = source or method.init_from
    own = layer_adapters(network)
    _check_method(adapters, own, source)
    _check_layers(adapters, own, network, source)
    _check_shapes(adapters, own, network, method, source)
    with torch.no_grad():
        for name, adapter in adapters.items():
            for leaf, tensor in adapter.rescaled(own[name].scale).items():
                own[name].tensors[leaf].copy_(tensor)


def _check_method(adapters: dict[str, LayerAdapter], own: dict[str, LayerAdapter], source: object) -> None:
    methods = {adapter.method() for adapter in adapters.values()}
    if methods != {next(iter(own.values())).method()}:
        raise UsageError(
            f"method.init_from={source} holds {' and '.join(sorted(methods)) or 'no adapter'}; "
            f"type method={min(methods, default='full')}"
        )


def _check_layers(
    adapters: dict[str, LayerAdapter], own: dict[str, LayerAdapter], network: torch.nn.Module, source: object
) -> None:
    missing, extra = sorted(own.keys() - adapters.keys()), sorted(adapters.keys() - own.keys())
    differences = [
        f"{len(names)} {what} ({', '.join(names[:3])})"
        for names, what in ((missing, "only in method.targets"), (extra, "only in init_from"))
        if names
    ]
    if differences:
        raise UsageError(
            f"method.init_from={source} adapts different layers from method.targets: {'; '.join(differences)}. "
            f"Type method.targets=[{','.join(_shortest_targets(adapters, network))}]"
        )


def _check_shapes(
    adapters: dict[str, LayerAdapter],
    own: dict[str, LayerAdapter],
    network: torch.nn.Module,
    method: Adapter,
    source: object,
) -> None:
    wrong = [name for name, adapter in adapters.items() if _shapes(adapter) != _shapes(own[name])]
    if not wrong:
        return
    ranks = sorted({rank for adapter in adapters.values() if (rank := adapter.rank()) is not None})
    if settings := _fitting_settings(adapters, network, method, ranks):
        remedy = f"type {settings}"
    elif len(ranks) > 1:
        remedy = "only one rank for all layers is supported"
    else:
        remedy = "no settings of this method give these shapes: it is of another model, or was trained by another rule"
    factors = "whole factors" if not ranks else f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    raise UsageError(
        f"method.init_from={source} has {factors}, and its shapes do not fit method.rank={method.rank} in {len(wrong)} "
        f"of {len(own)} layers (for example {wrong[0]}: {_shapes(adapters[wrong[0]])}); {remedy}"
    )


def _shapes(adapter: LayerAdapter) -> Shapes:
    return {leaf: tuple(tensor.shape) for leaf, tensor in adapter.tensors.items()}


def _fitting_settings(
    adapters: dict[str, LayerAdapter], network: torch.nn.Module, method: Adapter, ranks: list[int]
) -> str | None:
    """Returns the settings to type with which `method` gives all adapters their shapes; None if there are none.

    Tries them on layers of the same sizes.
    """
    wanted: list[tuple[torch.nn.Module, Shapes]] = []
    for name, adapter in adapters.items():
        layer: Any = network.get_submodule(name)
        wanted.append((_stand_in(layer.get_base_layer()), _shapes(adapter)))
    distinct = {(str(layer), tuple(sorted(shapes.items()))): (layer, shapes) for layer, shapes in wanted}
    for settings in _candidates([shapes for _, shapes in distinct.values()], method, ranks):
        layers = {f"layer{number}": layer for number, (layer, _) in enumerate(distinct.values())}
        trial = torch.nn.ModuleDict({name: _stand_in(layer) for name, layer in layers.items()})
        replace(method, **settings, targets=list(layers)).attach(trial, (), seed=0)
        found = layer_adapters(trial)
        if all(_shapes(found[name]) == shapes for name, (_, shapes) in zip(layers, distinct.values(), strict=True)):
            changed = {name: value for name, value in settings.items() if value != getattr(method, name)}
            return " ".join(f"method.{name}={str(value).lower()}" for name, value in changed.items())
    return None


def _stand_in(layer: Any) -> torch.nn.Module:
    """Returns a layer of the same size without memory."""
    if hasattr(layer, "kernel_size"):
        return torch.nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, device="meta")
    return torch.nn.Linear(layer.in_features, layer.out_features, device="meta")


def _candidates(shapes: list[Shapes], method: Adapter, ranks: list[int]) -> Iterator[dict[str, Any]]:
    """Yields settings of the method that may give these shapes, the most likely first."""
    if not hasattr(method, "decompose_factor"):
        yield from ({"rank": rank} for rank in ranks[:1])
        return
    # A factor is whole if its side is at most twice the rank.
    widest = max(size for layer in shapes for shape in layer.values() for size in shape)
    sizes = {size for layer in shapes for leaf, shape in layer.items() if leaf.startswith("lokr_w1") for size in shape}
    for rank in ranks[:1] or (method.rank, widest):
        for factor in (method.decompose_factor, -1, *sorted(sizes - {1})):
            for both in (False, True):
                yield {"decompose_factor": factor, "decompose_both": both, "rank": rank}


def _shortest_targets(adapters: dict[str, LayerAdapter], network: torch.nn.Module) -> list[str]:
    """Returns the shortest suffixes of names that match these layers and no other module of the network."""
    names = [name for name, _ in network.named_modules()]
    targets = set()
    for layer in adapters:
        parts = layer.split(".")
        for length in range(1, len(parts) + 1):
            target = ".".join(parts[-length:])
            if all(name in adapters for name in names if f".{name}".endswith(f".{target}")):
                break
        targets.add(target)
    return sorted(targets)
