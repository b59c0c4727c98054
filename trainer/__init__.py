"""Fine-tune image models, and decide by experiment how."""

__version__ = "0.1.0"
