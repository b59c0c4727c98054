"""Progress bars on stderr, and lines that appear above them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, ClassVar, TextIO
from weakref import WeakSet

from tqdm import tqdm

MARGIN = 3
"""Columns to the right of a bar that stay empty."""


class ProgressBar(tqdm):
    """A progress bar. Other text does not run into it if `write_line` writes it.

    On a terminal, an update overwrites the one before. In a file, each is a line, and there are few of them. `options`
    are those of tqdm.
    """

    # tqdm has a thread that redraws bars whose steps become slower. This class looks at the clock in each step instead
    # (`miniters`), and needs neither the thread nor a lock that several processes share.
    monitor_interval = 0
    _lock = threading.RLock()
    _instances: ClassVar[WeakSet[ProgressBar]] = WeakSet()

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any):
        # The kernel of a notebook replaces stderr, and can overwrite a line, too.
        in_notebook = type(sys.stderr).__module__.partition(".")[0] == "ipykernel"
        self.overwrites = in_notebook or sys.stderr.isatty()
        """Whether an update overwrites the one before."""
        if self.overwrites:
            options |= {"mininterval": 0.2, "dynamic_ncols": True}
        else:
            options |= {"mininterval": 10.0, "file": _Lines(sys.stderr)}
        super().__init__(iterable, miniters=1, **options)

    @property
    def format_dict(self) -> Any:
        """tqdm's values for the text of the bar, with fewer columns: a terminal prints ^C behind the bar."""
        values = super().format_dict
        if values.get("ncols"):
            values["ncols"] = max(1, values["ncols"] - MARGIN)
        return values

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Draws the bar. Unlike tqdm, frees the lock if a signal handler raises: another thread may need it."""
        if not self.disable:
            with self._lock:
                self.display()

    @classmethod
    def write_line(cls, text: str, stream: TextIO) -> None:
        """Writes a line to stdout or stderr, above the bar if there is one. Other threads may call this, too."""
        with cls._lock:
            bars = [bar for bar in cls._instances if bar.overwrites and not bar.disable]
            for bar in bars:
                bar.clear(nolock=True)
            stream.write(f"{text}\n")
            stream.flush()
            for bar in bars:
                if stream.isatty():
                    bar.refresh()
                else:
                    # A program such as tee may still have to pass the line on to the terminal. Until the next update
                    # there is no bar that the line could run into.
                    bar.last_print_t = time.time()


class _Lines:
    """Output file of a bar whose updates become lines."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        """`text` is an update, or only carriage returns, spaces and line feeds that position the cursor."""
        if update := text.strip():
            self.stream.write(f"{update}\n")

    def flush(self) -> None:
        self.stream.flush()
