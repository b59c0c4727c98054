"""Parts of the families whose denoiser is a UNet: the shared base class, encoder, network and tiny checkpoints."""
