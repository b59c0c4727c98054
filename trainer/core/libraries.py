"""Libraries whose import has to be kept in hand."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType


def hide_bitsandbytes() -> None:
    """Let nobody find bitsandbytes until it is asked for here: diffusers and peft import it wherever it is installed, which takes two
    seconds, and on some CPUs asks the hub for a kernel that serves 4-bit products."""
    sys.modules.setdefault("bitsandbytes", None)


def import_bitsandbytes() -> ModuleType:
    """bitsandbytes, imported without a look at the hub."""
    if sys.modules.get("bitsandbytes") is None:
        sys.modules.pop("bitsandbytes", None)
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        kernels = sys.modules.get("kernels")
        # A module that is None cannot be imported.
        sys.modules["kernels"] = None
        try:
            importlib.import_module("bitsandbytes")
        finally:
            del sys.modules["kernels"]
            if kernels is not None:
                sys.modules["kernels"] = kernels
        if asked := sys.modules.get("transformers.utils.import_utils"):
            # It remembers that there was none.
            asked.is_bitsandbytes_available.cache_clear()
    return sys.modules["bitsandbytes"]
