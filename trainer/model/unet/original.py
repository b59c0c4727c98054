"""Where the tensors of Stable Diffusion and SDXL are in files of the original program.

The opposite of the conversion in `diffusers.loaders.single_file_utils`, whose tables it uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.model.single_file import Form, Layout, Location, Piece
from trainer.model.unet.names import published_name

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
BLOCK = re.compile(
    r"(?P<kind>down_blocks|mid_block|up_blocks)(\.(?P<block>\d+))?\.(?P<part>\w+)\.(?P<i>\d+)\.(?P<rest>.+)"
)


def unet_layout(config: Mapping[str, Any]) -> Layout:
    """Returns the layout of a UNet with this diffusers config."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    tables: Any = DIFFUSERS_TO_LDM_MAPPING["unet"]
    outside = {**tables["layers"], **tables["addition_embed_type"]}
    # A level of the original has its blocks and, as another block, the resampling.
    per_level = config["layers_per_block"] + 1
    has_attention = ["Attn" in kind for kind in config["up_block_types"]]

    def locate(name: str) -> Location:
        if name in outside:
            return Location((Piece(outside[name]),))
        found = BLOCK.fullmatch(name)
        if found is None:
            return Location((Piece(name),))
        kind, part, i, rest = found["kind"], found["part"], int(found["i"]), found["rest"]
        level = int(found["block"] or 0)
        if part == "resnets":
            layer, _, leaf = rest.rpartition(".")
            rest = f"{RESNET.get(layer, layer)}.{leaf}"
        if kind == "mid_block":
            return Location((Piece(f"middle_block.{2 * i + (part == 'attentions')}.{rest}"),))
        if part == "downsamplers":
            return Location((Piece(f"input_blocks.{per_level * (level + 1)}.0.op.{rest.removeprefix('conv.')}"),))
        if part == "upsamplers":
            return Location((Piece(f"output_blocks.{per_level * (level + 1) - 1}.{1 + has_attention[level]}.{rest}"),))
        # The first input block is the convolution.
        block = (
            f"input_blocks.{per_level * level + i + 1}"
            if kind == "down_blocks"
            else f"output_blocks.{per_level * level + i}"
        )
        return Location((Piece(f"{block}.{int(part == 'attentions')}.{rest}"),))

    return locate


def vae_layout(config: Mapping[str, Any]) -> Layout:
    """Returns the layout of an AutoencoderKL with this diffusers config."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    outside: Any = DIFFUSERS_TO_LDM_MAPPING["vae"]
    levels = len(config["up_block_types"])

    def locate(name: str) -> Location:
        if name in outside:
            return Location((Piece(outside[name]),))
        half, _, inner = name.partition(".")
        found = BLOCK.fullmatch(inner)
        if found is None:
            return Location((Piece(name),))
        kind, part, i, rest = found["kind"], found["part"], int(found["i"]), found["rest"]
        rest = rest.replace("conv_shortcut", "nin_shortcut")
        if kind == "mid_block" and part == "attentions":
            layer, _, leaf = rest.rpartition(".")
            form = Form.convolution if leaf == "weight" and layer != "group_norm" else Form.same
            return Location((Piece(f"{half}.mid.attn_{i + 1}.{VAE_ATTENTION[layer]}.{leaf}"),), form)
        if kind == "mid_block":
            return Location((Piece(f"{half}.mid.block_{i + 1}.{rest}"),))
        level = int(found["block"])
        block = f"down.{level}" if kind == "down_blocks" else f"up.{levels - 1 - level}"
        inside = f"block.{i}" if part == "resnets" else part.removesuffix("rs")
        return Location((Piece(f"{half}.{block}.{inside}.{rest}"),))

    return locate


def clip_layout(name: str) -> Location:
    """The layout of a text encoder of OpenAI's, which the original program has from transformers."""
    return Location((Piece(published_name(name)),))


def open_clip_layout(name: str) -> Location:
    """The layout of a text encoder of OpenCLIP's, which keeps queries, keys and values in one tensor."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    tables: Any = DIFFUSERS_TO_LDM_MAPPING["openclip"]
    name = published_name(name)
    if name in tables["layers"]:
        form = Form.transposed if name == "text_projection.weight" else Form.same
        return Location((Piece(tables["layers"][name]),), form)
    for diffusers_part, original_part in tables["transformer"].items():
        name = name.replace(diffusers_part, original_part)
    key = f"transformer.{name}"
    found = re.fullmatch(r"(.+\.attn\.)([qkv])_proj\.(weight|bias)", key)
    if found is None:
        return Location((Piece(key),))
    row = "qkv".index(found[2])
    return Location((Piece(f"{found[1]}in_proj_{found[3]}", row, row + 1, 3),))


def untransposed_open_clip_layout(name: str) -> Location:
    """The same in files that diffusers' scripts have written, which keep the projection as it is in diffusers."""
    if name == "text_projection.weight":
        return Location((Piece(name),))
    return open_clip_layout(name)
