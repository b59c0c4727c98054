"""What every other package may import: errors, files, signals, random numbers, console output."""
