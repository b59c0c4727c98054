"""Parts of Lumina Image 2.0: encoder, prompt, layouts and tiny checkpoints."""
