"""Reads and writes safetensors files."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core import errors

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes dense tensors to a safetensors file. They may be on any device, non-contiguous, and share memory.

    The write is neither atomic nor synced; use it inside `files.replace_file`. Raises OSError.
    """
    import safetensors.torch

    # safetensors refuses tensors that are not contiguous or share memory.
    independent, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        independent[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    with writing_safetensors(path):
        safetensors.torch.save_file(independent, path, metadata)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file. Raises errors.DataError if it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise errors.DataError(
            f"{path} cannot be read as safetensors, the only format for weights that is accepted ({error})"
        ) from error


@contextlib.contextmanager
def writing_safetensors(path: Path) -> Iterator[None]:
    """Wraps a call of safetensors that writes `path`.

    I/O errors become OSError, and the file gets the permissions of its folder.
    """
    import safetensors

    try:
        yield
    except safetensors.SafetensorError as error:
        # A full disk is reported as "I/O error: No space left on device (os error 28)".
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from None
    # safetensors makes files that only their owner can read. Give the file the permissions of its folder instead.
    path.chmod(path.parent.stat().st_mode & 0o666)


def check_safetensors(path: Path) -> None:
    """Reads only the header of a safetensors file.

    Raises errors.DataError if it is invalid or does not match the size of the file.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, "np"):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise errors.DataError(
            f"{path} is not a valid safetensors file ({error}). Restore it, or type a different one."
        ) from error
