"""Output to the terminal and to the run's log."""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

from trainer.core.ranks import rank_and_world_size


def print_line(text: str) -> None:
    """Prints a line and adds it to the run's log. Only the main process prints."""
    if rank_and_world_size()[0] > 0:
        return
    write_line(text, sys.stdout)
    logging.getLogger("trainer").info(text)


def write_line(text: str, stream: TextIO | None) -> None:
    """Writes a line to stdout or stderr, above the progress bar if there is one. `stream` is None if it is closed."""
    from trainer.core.bars import ProgressBar

    if stream is not None:
        ProgressBar.write_line(text, stream)


class LineHandler(logging.Handler):
    """Writes log messages to stderr, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_line(self.format(record).rstrip(), sys.stderr)
        except Exception:
            self.handleError(record)


def timestamp() -> str:
    """Returns the local time in ISO 8601 format, with the UTC offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def format_bytes(count: float) -> str:
    """Returns a number of bytes as MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
