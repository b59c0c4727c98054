"""Parts of the FLUX family: tokens, encoder and the layout of its checkpoints."""
