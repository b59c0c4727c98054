"""A trainer for image models that is configured with Hydra."""

from trainer.core import libraries

__version__ = "0.1.0"

# This must happen before anything imports diffusers, which would import bitsandbytes.
libraries.hide_bitsandbytes()
