"""The names that layers have in the adapter files of this and other programs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from trainer.model import Family

PREFIXES = ("", "transformer.", "unet.", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
"""Starts of the names of the denoiser's layers: of diffusers, of ComfyUI and the original programs, of peft."""
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Starts of such names in which each dot is an underscore: of kohya's scripts, OneTrainer and LyCORIS."""
TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(lora_(te|t5|clip)|text_encoder|te\d?\.|clip_[lg]\.|t5|conditioner\.)"
)
"""Start of the name of a text encoder's layer in any program."""


class LayerRows(NamedTuple):
    """A layer of the network: the rows of a layer in a file from `first` to `last`, if all are `of` equal parts."""

    layer: str
    first: int = 0
    last: int = 1
    of: int = 1


def layer_names(family: Family) -> dict[str, list[LayerRows]]:
    """Returns name in an adapter file -> the layers of the network that it holds."""
    names: dict[str, list[LayerRows]] = {}
    for component in family.components:
        if family.network_name(component, "") is None:
            continue
        for layer, _ in family.meta_component(component).named_modules():
            own_name = family.network_name(component, layer)
            if not layer or own_name is None:
                continue
            whole = LayerRows(own_name)
            for name in {own_name, f"base_model.model.{own_name}", f"{component}.{layer}"}:
                names[name] = [whole]
            if component == family.denoiser:
                for name in _spellings(layer):
                    names[name] = [whole]
            else:
                names |= {name: [whole] for name in _text_encoder_names(component, layer, family)}
    _add_original_names(family, names)
    return names


def _spellings(layer: str) -> Iterator[str]:
    """Yields the names of a layer of the denoiser, given its name in diffusers or in the original program."""
    yield from (f"{prefix}{layer}" for prefix in PREFIXES)
    yield from (f"{prefix}{layer.replace('.', '_')}" for prefix in FLAT_PREFIXES)
    # diffusers, before it used peft.
    if match := re.fullmatch(r"(.+)\.(to_[qkv]|to_out)(\.0)?", layer):
        yield from (f"{prefix}{match[1]}.processor.{match[2]}_lora" for prefix in ("", "unet."))


def _text_encoder_names(component: str, layer: str, family: Family) -> Iterator[str]:
    published = family.published_layer(component, layer)
    yield f"{component}.{published}"
    number = component.removeprefix("text_encoder").removeprefix("_")
    for prefix in (f"lora_te{number or 1}_", *([] if number else ["lora_te_"])):
        yield f"{prefix}{published.replace('.', '_')}"


def _add_original_names(family: Family, names: dict[str, list[LayerRows]]) -> None:
    """Adds the names of the original program, in which one layer may hold several of diffusers'."""
    layout = family.original_layout(family.denoiser)
    rows: dict[str, list[LayerRows]] = {}
    for layer, _ in family.meta_component(family.denoiser).named_modules():
        own_name = family.network_name(family.denoiser, layer)
        pieces = layout(f"{layer}.weight").pieces if layer else ()
        # Of a layer in several pieces, each would be a layer of its own in the file.
        if own_name is not None and len(pieces) == 1:
            key, *fraction = pieces[0]
            rows.setdefault(key.removesuffix(".weight"), []).append(LayerRows(own_name, *fraction))
    for name, layers in rows.items():
        layers.sort(key=lambda layer: layer.first / layer.of)
        for original in (name, *family.other_layer_names(name)):
            for spelling in _spellings(original):
                names.setdefault(spelling, layers)
