"""Fine-tune image models, and decide by experiment how."""

from trainer.core import libraries

__version__ = "0.1.0"

# Here, since it must come before the first import of diffusers, whoever makes it.
libraries.hide_bitsandbytes()
