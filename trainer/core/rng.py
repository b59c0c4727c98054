"""Random numbers as a function of what they are for, never of what was drawn before.

Every draw names its purpose: `normal(shape, seed, "noise", step, sample_id)`. The names are hashed into the 128-bit key
of a counter-based generator (Philox 4x64; Salmon et al., SC 2011). So a resumed run, a different number of workers
and a different machine all draw the same numbers, and drawing for one purpose cannot disturb another.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def generator(*names: int | float | str) -> np.random.Generator:
    """Returns an independent generator for these names. Equal names give equal numbers on every machine."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=_key(names, 16)))


def normal(shape: tuple[int, ...], *names: int | float | str) -> torch.Tensor:
    """Returns standard normal numbers for these names, float32 on the CPU."""
    import numpy as np
    import torch

    return torch.from_numpy(generator(*names).standard_normal(shape, dtype=np.float32))


def seed_for(*names: int | float | str) -> int:
    """Returns a 63-bit integer derived from these names, for generators that only accept a seed."""
    return _key(names, 8) >> 1


def uniform(*names: int | float | str) -> float:
    """Returns a number in [0, 1) for these names."""
    return (_key(names, 8) >> 11) / 2**53


def _key(names: tuple[int | float | str, ...], size: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:size], "little")
