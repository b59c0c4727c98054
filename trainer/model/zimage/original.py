"""Where the tensors of Z-Image's transformer are in single files, such as those for ComfyUI.

The opposite of `convert_z_image_transformer_checkpoint_to_diffusers` in `diffusers.loaders.single_file_utils`.
"""

from __future__ import annotations

from trainer.model.single_file import Location, Piece

GROUPS = {"all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1": "final_layer"}
"""Layers that the network has once for each size of patches; all published networks have one size."""
ATTENTION = {
    ".attention.to_out.0.": ".attention.out.",
    ".attention.norm_q.": ".attention.q_norm.",
    ".attention.norm_k.": ".attention.k_norm.",
}


def transformer_layout(name: str) -> Location:
    """The layout of Z-Image's transformer."""
    for row, letter in enumerate("qkv"):
        if f".attention.to_{letter}." in name:
            key = name.replace(f".attention.to_{letter}.", ".attention.qkv.")
            return Location((Piece(key, row, row + 1, 3),))
    for own, original in {**GROUPS, **ATTENTION}.items():
        name = name.replace(own, original)
    return Location((Piece(name),))
