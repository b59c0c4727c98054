"""The files of one checkpoint: written, hashed, and verified when they are read.

A checkpoint is a folder `step-00000100` with `weights.safetensors`, `optimizer.safetensors`, `ema.safetensors` if the
run keeps an average, `state.json`, and `MANIFEST`, which holds the size and sha256 of each file and of itself.
Neither safetensors nor JSON notices a flipped bit, so a file that differs from its manifest is never used. Only
safetensors and JSON are read, never a pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core import documents, files, tensor_files
from trainer.core.digests import sha256
from trainer.core.errors import DataError, NonFiniteError
from trainer.core.state_dicts import join_tensors, split_tensors

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
EMA = "ema.safetensors"
STATE = "state.json"
MANIFEST = "MANIFEST"

REPLACED = ".replaced-"
"""Marks the folder name of a checkpoint that is being replaced by another one of the same step."""
_FOLDER_NAME = re.compile(r"step-(\d{8,})(\.replaced-\w+)?")
_DAMAGE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP}
"""Error numbers that mean that a checkpoint is damaged: by the disk, or because it was copied incompletely.

Others do not, such as missing permissions.
"""


@dataclass(slots=True)
class Checkpoint:
    """The contents of a checkpoint. Tensors are on the CPU, in the dtype and shape they were saved with."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    """Argument for `optimizer.load_state_dict`."""
    ema: dict[str, Tensor] | None
    """Exponential moving average of the weights, if the run keeps one."""
    state: dict[str, Any]
    """Values that JSON can represent. `val_loss`, if finite, is the held-out loss of these weights."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def is_checkpoint(path: Path) -> bool:
    """Returns whether the path is a folder with the name of a checkpoint. Its contents are not verified."""
    return _FOLDER_NAME.fullmatch(path.name) is not None and path.is_dir()


def step_of(folder: Path) -> int:
    """Returns the step in the name of a checkpoint folder."""
    match = _FOLDER_NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes all files into an existing folder and waits until they are on the disk.

    Raises errors.NonFiniteError if a tensor is not finite, and OSError.
    """
    packed, tensors = split_tensors(checkpoint.optimizer)
    contents = {WEIGHTS: checkpoint.weights, OPTIMIZER: tensors}
    if checkpoint.ema is not None:
        contents[EMA] = checkpoint.ema
    for name, content in contents.items():
        _check_finite(checkpoint.step, name, content)
        tensor_files.save_tensors(folder / name, content)
    state = json.dumps({"state": checkpoint.state, "optimizer": packed})
    (folder / STATE).write_text(state, encoding="utf-8")
    entries = {}
    for name in [*contents, STATE]:
        files.fsync(folder / name)
        entries[name] = {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size}
    manifest = {"schema": SCHEMA, "step": checkpoint.step, "files": entries}
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    (folder / MANIFEST).write_bytes(_with_digest(body))
    files.fsync(folder / MANIFEST)
    files.fsync_folder(folder)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads and verifies a checkpoint. Raises errors.DataError if it is damaged; the message is the reason alone."""
    manifest = _read_manifest(folder)
    names = [WEIGHTS, OPTIMIZER, STATE] + ([EMA] if EMA in manifest["files"] else [])
    contents = {name: _read_content(folder, manifest, name) for name in names}
    try:
        return Checkpoint(
            step=manifest["step"],
            weights=contents[WEIGHTS],
            optimizer=join_tensors(contents[STATE]["optimizer"], contents[OPTIMIZER]),
            ema=contents.get(EMA),
            state=contents[STATE]["state"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{STATE} is not the state of a checkpoint: {error!r}") from None


def read_val_loss(folder: Path) -> float | None:
    """Returns the held-out loss in a checkpoint; None if there is none, it is not finite, or the file is damaged."""
    try:
        content = documents.parse_json(_read_verified(folder, _read_manifest(folder), STATE))
        loss = content["state"].get("val_loss")
    except (DataError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else None


def _with_digest(body: bytes) -> bytes:
    """Returns the manifest file for a body: a second line holds the sha256 of the first."""
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _read_manifest(folder: Path) -> dict[str, Any]:
    data = _read(folder / MANIFEST)
    body = data.partition(b"\n")[0]
    if data != _with_digest(body):
        raise DataError(f"{MANIFEST} is incomplete or altered")
    try:
        manifest = documents.parse_json(body)
        step, schema, entries = manifest["step"], manifest["schema"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{MANIFEST} cannot be read: {error!r}") from None
    if schema != SCHEMA:
        raise DataError(f"it has the format {schema!r}, but this version of the program reads {SCHEMA}")
    if step != step_of(folder) or not isinstance(entries, dict):
        raise DataError(f"{MANIFEST} is that of step {step}")
    return manifest


def _read_content(folder: Path, manifest: dict[str, Any], name: str) -> dict[str, Any]:
    import safetensors
    from safetensors.torch import load

    data = _read_verified(folder, manifest, name)
    try:
        return documents.parse_json(data) if name == STATE else load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, AssertionError) as error:
        raise DataError(f"{name} cannot be read: {error}") from None


def _read_verified(folder: Path, manifest: dict[str, Any], name: str) -> bytes:
    """Reads a file once, so that the bytes that are used are the bytes that were hashed."""
    entry = manifest["files"].get(name)
    if not isinstance(entry, dict):
        raise DataError(f"{MANIFEST} does not list {name}")
    data = _read(folder / name, entry.get("size"))
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise DataError(f"the bytes of {name} are not those that were saved: their sha256 differs")
    return data


def _read(path: Path, expected_size: int | None = None) -> bytes:
    """Reads a file. Raises errors.DataError if it is missing or its size is not the expected one."""
    with files.storage_errors("read", path):
        try:
            status = path.stat()
            # Checked before the file is opened: opening a pipe or reading an endless device would block.
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path.name} is not a file")
            if expected_size is not None and status.st_size != expected_size:
                raise DataError(f"{path.name} has {status.st_size} bytes, but {expected_size} were saved")
            return path.read_bytes()
        except OSError as error:
            if error.errno in _DAMAGE_ERRNOS:
                raise DataError(f"{path.name}: {error.strerror}") from None
            raise


def _check_finite(step: int, file_name: str, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        # isfinite is not implemented for one-byte floats. Integers (8-bit optimizer states) are always finite.
        one_byte_float = tensor.is_floating_point() and tensor.element_size() == 1
        if not (tensor.float() if one_byte_float else tensor).isfinite().all():
            raise NonFiniteError(
                f"Step {step} was not saved: {key!r} of {file_name} contains NaN or infinity. "
                "The checkpoints before it are unchanged; the usual remedy is a lower optimizer.lr."
            )
