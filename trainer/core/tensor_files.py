"""Reads and writes safetensors files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core import errors

if TYPE_CHECKING:
    from torch import Tensor, dtype

SAFETENSORS_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
"""How safetensors spells the types of torch."""


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
    from safetensors.torch import load_file

    with _reading(path):
        return load_file(path)


def read_header(path: Path) -> tuple[dict[str, str], list[str]]:
    """Returns the metadata of a safetensors file and the names of its tensors.

    Raises errors.DataError if it cannot be read.
    """
    import safetensors

    with _reading(path), safetensors.safe_open(path, "np") as file:
        return file.metadata() or {}, list(file.keys())


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what safetensors raises for a damaged file, or torch for a type that it lacks, into errors.DataError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        if errors.is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise errors.DataError(
            f"{path} cannot be read as safetensors, the only format for weights that is accepted ({reason})"
        ) from error


def stream_tensors(
    path: Path, specs: Mapping[str, tuple[dtype, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> None:
    """Writes a safetensors file with one tensor in memory at a time, which the safetensors library cannot.

    `specs` are the dtypes and shapes of the tensors, and `read` returns each by name. Like `save_tensors`, the write is
    neither atomic nor synced. Raises OSError.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # As in the library, the widest types come first, so that every tensor is aligned.
    names = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
    for name in names:
        kind, shape = specs[name]
        start, end = end, end + kind.itemsize * math.prod(shape)
        header[name] = {"dtype": SAFETENSORS_NAMES[str(kind)], "shape": shape, "data_offsets": (start, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            tensor = read(name).detach()
            assert (tensor.dtype, tuple(tensor.shape)) == specs[name], name
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


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
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file, so that files with the same content are equal. Raises OSError.

    safetensors writes several entries in an order that differs from file to file.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = header.get("__metadata__", {})
        if len(metadata) < 2:
            return
        header["__metadata__"] = dict(sorted(metadata.items()))
        data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(data) == length, "the same entries take the same space"
        file.seek(8)
        file.write(data)


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
