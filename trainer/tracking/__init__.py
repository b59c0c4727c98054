"""Tracking: the journal in the run folder is the record of a run; a tracker such as MLflow follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.tracking.journal import Journal
    from trainer.tracking.tracker import Tracker

RESULT = "<!-- Result of the run, written by the program -->\n<!-- end of the result -->"
"""Two lines of a description between which a tracker shows the latest measurements and images of a run."""


@dataclass(slots=True)
class Tracking:
    """Settings of a tracker. Runs to be compared share an `experiment`. This base class tracks nothing."""

    experiment: str = "trainer"

    def open(
        self,
        journal: Journal,
        out: Path,
        *,
        name: str,
        params: dict[str, str],
        tags: dict[str, str],
        description: str = "",
        parent: str | None = None,
    ) -> Tracker:
        """Returns a tracker: a context manager that shows the run of `journal` as it grows, and how the run ends.

        Args:
            journal: Journal of the run. Its folder must be locked, since runs with unlocked folders count as dead.
            out: Parent folder of all runs, which holds the default database.
            name: Title of the run.
            params: Settings of the run, written once.
            tags: Properties that may change between attempts. `trainer.folder_id` identifies the run permanently, in
                case its folder has no record of the ID that the tracker gave it.
            description: Markdown text on the page of the run; it may contain `RESULT`.
            parent: `Tracker.run_id` of the run to nest this run under.
        """
        from trainer.tracking.tracker import Tracker

        return Tracker()

    def attach(
        self, folder: Path, out: Path, metrics: Mapping[int, Mapping[str, float]], paths: Sequence[Path], name: str
    ) -> str | None:
        """Adds what was measured after training to the run in `folder`; for `out` see `open`.

        Returns why the tracker does not have it; None if it does, or if nothing tracks the run.

        Args:
            metrics: Step -> name -> value.
            paths: Files to keep with the run, under `name`.
        """
        return None

    def page(self, out: Path) -> str | None:
        """Returns the URL that shows the runs in `out`, or the command that starts a server; None if nothing tracks."""
        return None

    def links(self, folder: Path, out: Path) -> dict[str, str]:
        """Returns the pages, title -> URL, that show the run in `folder`; empty until the tracker has all of it.

        For `out` see `open`.
        """
        return {}

    def sweep_links(self, folder: Path, run_folders: Sequence[Path]) -> dict[str, str]:
        """Returns the pages, title -> URL, that show the sweep in `folder` and compare its runs in `run_folders`.

        Empty until the tracker has answered.
        """
        return {}

    def is_complete(self, folder: Path, out: Path) -> bool:
        """Returns whether this tracker has everything about the finished run in `folder`. For `out` see `open`."""
        return True
