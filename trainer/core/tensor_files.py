"""Reading and writing safetensors files."""

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
    """safetensors' `save_file` for any dense tensors, on any device, contiguous or not, sharing memory or not. Raises OSError.

    The file is neither atomic nor on the disk yet: `with replace_file(path) as temporary: save_tensors(temporary, tensors)`.
    """
    import safetensors.torch

    plain, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage_of = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage_of in storages else tensor
        storages.add(storage_of)
    with writing_safetensors(path):
        safetensors.torch.save_file(plain, path, metadata)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises errors.DataError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise errors.DataError(
            f"{path} cannot be read as safetensors, the only kind of weights that is read here ({error})"
        ) from error


@contextlib.contextmanager
def writing_safetensors(path: Path) -> Iterator[None]:
    """For a block in which safetensors writes `path`: a file like any other, and OSError where the disk does not take it."""
    import safetensors

    try:
        yield
    except safetensors.SafetensorError as error:
        # A full disk comes as "I/O error: No space left on device (os error 28)".
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from None
    # safetensors makes files that only their owner may read; as readable as the folder is what any other file would be.
    path.chmod(path.parent.stat().st_mode & 0o666)


def check_safetensors(path: Path) -> None:
    """Read a safetensors file's header, and no more. Raises errors.DataError where it is absurd or does not describe the bytes behind it."""
    import safetensors

    try:
        with safetensors.safe_open(path, "np"):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise errors.DataError(
            f"{path} is not the safetensors file it claims to be ({error}). Restore it, or type another."
        ) from error
