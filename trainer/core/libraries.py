"""Control over when and how optional libraries are imported."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def hide_bitsandbytes() -> None:
    """Makes bitsandbytes look as if it were not installed until `import_bitsandbytes` is called.

    diffusers and peft import it whenever it is installed. That takes two seconds and, on some CPUs, requests a kernel
    for 4-bit products from the hub.
    """
    # A module that is None in sys.modules cannot be imported. typeshed does not declare that.
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def import_bitsandbytes() -> ModuleType:
    """Returns bitsandbytes, imported without a request to the hub."""
    if sys.modules.get("bitsandbytes") is None:
        sys.modules.pop("bitsandbytes", None)
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        # bitsandbytes uses the `kernels` package for its request to the hub.
        kernels = sys.modules.get("kernels")
        sys.modules["kernels"] = None  # type: ignore[assignment]
        try:
            importlib.import_module("bitsandbytes")
        finally:
            del sys.modules["kernels"]
            if kernels is not None:
                sys.modules["kernels"] = kernels
        if import_utils := sys.modules.get("transformers.utils.import_utils"):
            # transformers has cached that bitsandbytes was not available.
            import_utils.is_bitsandbytes_available.cache_clear()
    return sys.modules["bitsandbytes"]


@contextmanager
def hidden_scipy() -> Iterator[None]:
    """Inside, scipy looks as if it were not installed, unless it is imported already.

    diffusers and transformers import it whenever it is installed, which takes almost a second, for schedulers and
    losses that the program does not use. They do not look for it again later, so this is not for a process of the
    user's, such as a notebook.
    """
    hides = sys.modules.setdefault("scipy", None) is None  # type: ignore[arg-type]
    try:
        yield
    finally:
        if hides:
            del sys.modules["scipy"]
