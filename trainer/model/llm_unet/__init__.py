"""Parts of a family whose UNet is conditioned by a frozen language model: the network and a tiny checkpoint."""
