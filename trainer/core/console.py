"""Output to the terminal and to the run's log."""

from __future__ import annotations

import logging
import sys
import time

from trainer.core.ranks import rank_and_world_size


def print_line(text: str) -> None:
    """Prints a line and adds it to the run's log. Only the main process prints."""
    if rank_and_world_size()[0] > 0:
        return
    print(text, flush=True)
    logging.getLogger("trainer").info(text)


def timestamp() -> str:
    """Returns the local time in ISO 8601 format, with the UTC offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def format_bytes(count: float) -> str:
    """Returns a number of bytes as MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def refresh_interval() -> float:
    """Returns the seconds between two updates of a progress bar: long if stderr is a file, to keep the file short."""
    # The kernel of a notebook replaces stderr. Each update overwrites the one before, as on a terminal.
    in_notebook = type(sys.stderr).__module__.partition(".")[0] == "ipykernel"
    return 0.2 if in_notebook or sys.stderr.isatty() else 10.0
