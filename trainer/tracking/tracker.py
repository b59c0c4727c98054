"""The interface of a tracker; the base class shows nothing and serves runs with `tracking=none`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self


class Tracker:
    """Follows the journal of a run and shows it elsewhere while the context is open; this base class shows nothing.

    Training never waits for a tracker. A failure is logged instead of raised, and what is missing is sent later.
    """

    run_id: str | None = None
    """The tracker's own ID of the run; None until it is known."""
    errors: int = 0
    """Number of failed attempts to reach the tracking server or database."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        pass

    def flush(self, timeout: float = 20.0) -> bool:
        """Waits at most `timeout` seconds until everything now in the journal is shown; returns whether it is."""
        return True

    def log_children(
        self,
        folders: Sequence[Path],
        *,
        description: str,
        artifacts: Sequence[Path] = (),
        varied: Sequence[str] = (),
        pruned: Mapping[Path, str] | None = None,
    ) -> bool:
        """Nests the runs in `folders` under this run and gives this run a `description` (Markdown) and files.

        Runs that already have a parent keep it. PNG files among the `artifacts` are shown below the description.
        `varied` names the settings in which the runs differ. `pruned` says of runs that were ended early when that was,
        such as "at step 10". Returns whether all of this has arrived.
        """
        return True
