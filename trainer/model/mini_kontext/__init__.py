"""The shipped mini checkpoint (`weights/`) and the command that makes its untrained base; see `__main__`."""
