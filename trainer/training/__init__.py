"""One attempt at a run: its folder, data, network, loop, checkpoints and evaluations."""
