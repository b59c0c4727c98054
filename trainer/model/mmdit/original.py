"""Where the tensors of Stable Diffusion 3's transformer are in files of the original program.

The opposite of `convert_sd3_transformer_checkpoint_to_diffusers` in `diffusers.loaders.single_file_utils`.
"""

from __future__ import annotations

import re

from trainer.model.single_file import Location, Piece

OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
QKV = {
    **{f"attn.to_{letter}": ("x_block.attn.qkv", row) for row, letter in enumerate("qkv")},
    **{f"attn.add_{letter}_proj": ("context_block.attn.qkv", row) for row, letter in enumerate("qkv")},
    **{f"attn2.to_{letter}": ("x_block.attn2.qkv", row) for row, letter in enumerate("qkv")},
}


def transformer_layout(name: str, blocks: int) -> Location:
    """The layout of a transformer with this number of blocks."""
    if name == "pos_embed.pos_embed":
        return Location((Piece("pos_embed"),))
    layer, _, leaf = name.rpartition(".")
    if layer in OUTSIDE:
        return Location((Piece(f"{OUTSIDE[layer]}.{leaf}"),))
    if layer == "norm_out.linear":
        return _swapped(f"final_layer.adaLN_modulation.1.{leaf}")
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    if found is None:
        return Location((Piece(name),))
    number, part = int(found[1]), found[2]
    block = f"joint_blocks.{number}"
    if part in QKV:
        key, row = QKV[part]
        return Location((Piece(f"{block}.{key}.{leaf}", row, row + 1, 3),))
    key = f"{block}.{BLOCK.get(part, part)}.{leaf}"
    # The last block only reads the text: its norm has a scale and a shift, and no gates.
    if part == "norm1_context.linear" and number == blocks - 1:
        return _swapped(key)
    return Location((Piece(key),))


def _swapped(key: str) -> Location:
    """diffusers has the scale before the shift."""
    return Location((Piece(key, 1, 2, 2), Piece(key, 0, 1, 2)))
