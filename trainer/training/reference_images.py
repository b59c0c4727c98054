"""The control images and targets of the samples for which a run generates images, saved beside the generated images.

`pictures/references/1-control.png 1-target.png 2-control.png ...`
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.dataset import image_grid

if TYPE_CHECKING:
    import numpy as np


def save(run_folder: Path, number: int, images: Mapping[str, np.ndarray]) -> None:
    """Saves the references of sample `number` (from 1), title -> image (H, W, 3) uint8.

    Files that are up to date stay. Raises errors.StorageError.
    """
    import numpy as np

    for order, (title, image) in enumerate(images.items()):
        path = _folder(run_folder) / f"{number}-{order}-{title.replace(' ', '_')}.png"
        with contextlib.suppress(OSError, ValueError):
            if np.array_equal(image_grid.load_png(path), image):
                continue
        image_grid.save_png(path, image)


def load(run_folder: Path, number: int) -> dict[str, np.ndarray]:
    """Returns the references of sample `number` that `save` wrote, in their order.

    Raises OSError or ValueError if a file is damaged.
    """
    paths = [
        (int(found[1]), found[2].replace("_", " "), path)
        for path in _folder(run_folder).glob(f"{number}-*.png")
        if (found := re.fullmatch(rf"{number}-(\d+)-(.+)\.png", path.name))
    ]
    return {title: image_grid.load_png(path) for _, title, path in sorted(paths)}


def _folder(run_folder: Path) -> Path:
    return run_folder / "pictures" / "references"
