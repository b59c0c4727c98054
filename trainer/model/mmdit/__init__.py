"""Parts of Stable Diffusion 3, whose transformer is called MMDiT: encoder, layouts and tiny checkpoints."""
