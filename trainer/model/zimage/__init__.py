"""Parts of the Z-Image family: encoder, layout of the original program, and a small checkpoint."""
