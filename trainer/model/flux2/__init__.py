"""Parts of the FLUX.2 family: encoder, layout of the original program, and a small checkpoint."""
