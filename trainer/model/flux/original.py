"""Where the tensors of FLUX's transformer are in files of the original program.

The opposite of `convert_flux_transformer_checkpoint_to_diffusers` in `diffusers.loaders.single_file_utils`.
"""

from __future__ import annotations

import re

from trainer.model.single_file import Location, Piece

OUTSIDE = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
DOUBLE_QKV = {
    **{f"attn.to_{letter}": ("img_attn.qkv", row) for row, letter in enumerate("qkv")},
    **{f"attn.add_{letter}_proj": ("txt_attn.qkv", row) for row, letter in enumerate("qkv")},
}
DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
# The MLP is four times as wide as queries, keys and values.
SINGLE_QKV = {"attn.to_q": (0, 1), "attn.to_k": (1, 2), "attn.to_v": (2, 3), "proj_mlp": (3, 7)}


def transformer_layout(name: str) -> Location:
    """The layout of FLUX's transformer."""
    layer, _, leaf = name.rpartition(".")
    if layer in OUTSIDE:
        return Location((Piece(f"{OUTSIDE[layer]}.{leaf}"),))
    if layer == "norm_out.linear":
        # diffusers has the scale before the shift.
        key = f"final_layer.adaLN_modulation.1.{leaf}"
        return Location((Piece(key, 1, 2, 2), Piece(key, 0, 1, 2)))
    found = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", layer)
    if found is None:
        return Location((Piece(name),))
    single, number, part = found.groups()
    block = f"{'single' if single else 'double'}_blocks.{number}"
    if part in (norms := SINGLE_NORMS if single else DOUBLE_NORMS):
        return Location((Piece(f"{block}.{norms[part]}.scale"),))
    if single and part in SINGLE_QKV:
        return Location((Piece(f"{block}.linear1.{leaf}", *SINGLE_QKV[part], 7),))
    if not single and part in DOUBLE_QKV:
        key, row = DOUBLE_QKV[part]
        return Location((Piece(f"{block}.{key}.{leaf}", row, row + 1, 3),))
    layers = SINGLE if single else DOUBLE
    return Location((Piece(f"{block}.{layers.get(part, part)}.{leaf}"),))


def xlabs_layer(name: str) -> tuple[str, ...]:
    """Returns the name of a layer of the original program in XLabs' LoRA files, which have few of them."""
    found = re.fullmatch(r"(double_blocks\.\d+)\.(img|txt)_attn\.(qkv|proj)", name)
    if found is None:
        return ()
    block, stream, layer = found.groups()
    return (f"{block}.processor.{layer}_lora{1 if stream == 'img' else 2}",)
