"""Where the tensors of Lumina Image 2.0's transformer are in single files, such as those for ComfyUI.

The opposite of `convert_lumina2_to_diffusers` in `diffusers.loaders.single_file_utils`.
"""

from __future__ import annotations

from trainer.model.single_file import Location, Piece

NAMES = {
    "time_caption_embed.caption_embedder.": "cap_embedder.",
    "time_caption_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_caption_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "norm_out.linear_1.": "final_layer.adaLN_modulation.1.",
    "norm_out.linear_2.": "final_layer.linear.",
    ".attn.to_out.0.": ".attention.out.",
    ".attn.norm_q.": ".attention.q_norm.",
    ".attn.norm_k.": ".attention.k_norm.",
    ".feed_forward.linear_": ".feed_forward.w",
    ".norm1.linear.": ".adaLN_modulation.1.",
    ".norm1.norm.": ".attention_norm1.",
    # Blocks without a time, which read the text, have a plain norm.
    ".norm1.": ".attention_norm1.",
    ".norm2.": ".attention_norm2.",
}
"""Parts of names in the network -> in the file, in this order."""
QKV = {".attn.to_q.": (0, 3), ".attn.to_k.": (3, 4), ".attn.to_v.": (4, 5)}
"""Rows of the joined layer, in fifths: there are three times as many heads of queries as of keys and values."""


def transformer_layout(name: str) -> Location:
    """The layout of the transformer."""
    for part, (first, last) in QKV.items():
        if part in name:
            return Location((Piece(name.replace(part, ".attention.qkv."), first, last, 5),))
    for own, original in NAMES.items():
        name = name.replace(own, original)
    return Location((Piece(name),))
