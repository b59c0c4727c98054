"""Compares networks by the images that they generate for the same prompts, control images and seeds."""
