"""Foundations that know nothing of training: errors, files, signals, random numbers, the terminal."""
