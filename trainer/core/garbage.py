"""When Python's garbage collector runs in a process of the program: seldom while it starts, and not when it ends.

The libraries consist of half a million objects that live as long as the process. By default the collector visits them
again and again while they are imported, and once more at the end.
"""

from __future__ import annotations

import gc

_SELDOM = 50_000
"""New objects between two collections; 700 by default. Importing the libraries then takes a fifth less time."""
_usual_thresholds: tuple[int, int, int] | None = None


def collect_seldom() -> None:
    """Collects seldom until `collect_as_usual` is called. Not for a process of the user's, such as a notebook."""
    global _usual_thresholds
    _usual_thresholds = gc.get_threshold()
    gc.set_threshold(_SELDOM, *_usual_thresholds[1:])


def collect_as_usual() -> None:
    """Ends what `collect_seldom` began: from now on, cycles of objects may hold the memory of a device."""
    global _usual_thresholds
    if _usual_thresholds is not None:
        gc.set_threshold(*_usual_thresholds)
        _usual_thresholds = None


def skip_last_collection() -> None:
    """Call this just before the process ends. Python would collect all objects, which can take more than a second."""
    gc.freeze()
