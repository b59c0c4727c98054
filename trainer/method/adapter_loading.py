"""Starting an adapter from another one."""

from __future__ import annotations

import torch

from trainer.core.errors import UsageError
from trainer.method.adapter_layers import LayerAdapter, layer_adapters


def load_into(adapters: dict[str, LayerAdapter], network: torch.nn.Module, source: object) -> None:
    """Copies `adapters` (by the name of the layer) into the attached adapter, even if their alphas differ.

    Raises errors.UsageError, which says what to type, if the methods, ranks or layers differ. `source` names `adapters`
    in the message.
    """
    own = layer_adapters(network)
    _check_method(adapters, own, source)
    _check_layers(adapters, own, network, source)
    _check_shapes(adapters, own, source)
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


def _check_shapes(adapters: dict[str, LayerAdapter], own: dict[str, LayerAdapter], source: object) -> None:
    def shapes(adapter: LayerAdapter) -> dict[str, tuple[int, ...]]:
        return {leaf: tuple(tensor.shape) for leaf, tensor in adapter.tensors.items()}

    wrong = [name for name, adapter in adapters.items() if shapes(adapter) != shapes(own[name])]
    if not wrong:
        return
    ranks = sorted({rank for adapter in adapters.values() if (rank := adapter.rank()) is not None})
    remedy = f"type method.rank={ranks[0]}" if len(ranks) == 1 else "only one rank for all layers is supported"
    raise UsageError(
        f"method.init_from={source} has rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks)) or 'none'}, "
        f"and its shapes do not fit method.rank={own[wrong[0]].rank()} in {len(wrong)} of {len(own)} layers "
        f"(for example {wrong[0]}: {shapes(adapters[wrong[0]])}); {remedy}"
    )


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
