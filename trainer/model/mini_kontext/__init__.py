"""The small model that ships with the program: its weights, and the command that makes its untrained base.

`weights/` is a checkpoint in the layout of FLUX Kontext, for images of 64 px; its transformer has 2.3 M parameters.
`make mini` trains it from scratch: `__main__` writes the base, and two full fine-tunes with this program train its
transformer.
"""
