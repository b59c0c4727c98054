"""Where the tensors of FLUX.2's transformer are in files of the original program.

The opposite of `convert_flux2_transformer_checkpoint_to_diffusers` in `diffusers.loaders.single_file_utils`.
"""

from __future__ import annotations

import re

from trainer.model.flux.original import DOUBLE_NORMS, DOUBLE_QKV, SINGLE_NORMS
from trainer.model.single_file import Location, Piece

OUTSIDE = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}


def transformer_layout(name: str) -> Location:
    """The layout of FLUX.2's transformer."""
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
    if not single and part in DOUBLE_QKV:
        key, row = DOUBLE_QKV[part]
        return Location((Piece(f"{block}.{key}.{leaf}", row, row + 1, 3),))
    layers = SINGLE if single else DOUBLE
    return Location((Piece(f"{block}.{layers.get(part, part)}.{leaf}"),))
