"""Rank of this process and number of processes, read from the environment without importing torch."""

from __future__ import annotations

import os


def rank_and_world_size() -> tuple[int, int]:
    """Returns the rank of this process and the number of processes that train together; (0, 1) without a launcher."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(os.environ.get(name, "").isdigit() for name in names):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
