"""The interface of an export format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trainer.config.schema import Run


class ExportFormat:
    """Writes the trained weights in one format. `trainer.export.write.FORMATS` lists the formats."""

    def write(self, run: Run, network: torch.nn.Module, path: Path) -> None:
        """Writes the trained weights in `network` to `path`, reads them back and compares.

        An earlier export at `path` is replaced only if that succeeds.

        Raises errors.DataError if the weights differ, and errors.StorageError if they cannot be written.
        """
        raise NotImplementedError
