"""The images of a sweep: a heat map of two settings, and the generated images of the members side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.sweep.members import Member
from trainer.sweep.ranking import heat_map, rank
from trainer.training.tracked_run import shorten_overrides

if TYPE_CHECKING:
    import numpy as np

HEAT_MAP = "heat_map.png"
SAMPLES = "samples.png"
SHOWN_MEMBERS = 8
"""Number of members whose images are compared."""
SHOWN_SAMPLES = (1, 2)
"""Held-out samples whose images are compared."""


def draw_heat_map(folder: Path, members: Sequence[Member]) -> None:
    """Draws the best held-out losses over two settings; nothing unless exactly two settings vary, both numbers.

    Raises errors.StorageError.
    """
    from trainer.tracking import curves

    data = heat_map(members)
    if data is not None:
        curves.draw_heat_map(folder / HEAT_MAP, "best val/loss", data.x, data.y, data.losses)


def draw_samples(folder: Path, members: Sequence[Member]) -> None:
    """Draws the last images of the first held-out samples: control, target, and the members from best to worst.

    Draws nothing if there are no images or if their sizes differ. Raises errors.StorageError.
    """
    from trainer.dataset import image_grid

    shown = rank(members)[:SHOWN_MEMBERS]
    caption = describe_shown(members)
    with contextlib.suppress(OSError, ValueError, IndexError):
        folders = [Path(member.folder or "") for member in shown]
        steps = [max((run_folder / "pictures").glob("step-*")) for run_folder in folders]
        rows = []
        for sample in SHOWN_SAMPLES:
            references = _common_references(folders, sample)
            if references is None:
                references = {}
                caption += " Each member has held-out samples of its own."
            images = [image_grid.load_png(step / f"{sample}.png") for step in steps]
            if len({image.shape for image in [*images, *references.values()]}) != 1:
                return
            titles = [short_title(member) for member in shown]
            rows.append(image_grid.label_grid(references | dict(zip(titles, images, strict=True))))
        if len({row.shape for row in rows}) != 1:
            return
        image = image_grid.add_caption(image_grid.stack_rows(rows), caption)
        image_grid.save_png(folder / SAMPLES, image)


def describe_shown(members: Sequence[Member]) -> str:
    """Returns which members `draw_samples` shows."""
    count = len(rank(members))
    which = f"The best {SHOWN_MEMBERS} of {count} ranked members" if count > SHOWN_MEMBERS else "The ranked members"
    return f"{which} by held-out loss, the best first."


def short_title(member: Member) -> str:
    """Returns the settings that distinguish the member from the others, with the last parts of their names."""
    return shorten_overrides([f"{key}={value}" for key, value in member.varied.items()]) or f"{member.number}"


def _common_references(folders: Sequence[Path], sample: int) -> dict[str, np.ndarray] | None:
    """Returns the control and target images of a sample; None if they differ between the runs."""
    import numpy as np

    from trainer.training import reference_images

    first, *others = [reference_images.load(folder, sample) for folder in folders]
    if any(
        other.keys() != first.keys() or not all(np.array_equal(other[name], first[name]) for name in first)
        for other in others
    ):
        return None
    return first
