"""Exports: the trained weights as files for other programs, and adapters read from such files."""
