"""Checkpoints: committed once, hashed, verified before use, the last few and the best kept.

A checkpoint is a folder `step-00000100` with `weights.safetensors`, `optimizer.safetensors`, perhaps `ema.safetensors`, `state.json`, and
a `MANIFEST` with the size and sha256 of each and of itself. It is made under another name and renamed when all of it is on the disk, so a
folder of that name is whole. Neither safetensors nor JSON notices a flipped bit: what differs from its manifest is never used.
Only safetensors and JSON are read, never a pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core import errors, files, tensor_files
from trainer.core.digests import sha256

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
WEIGHTS, OPTIMIZER, EMA, STATE, MANIFEST = (
    "weights.safetensors",
    "optimizer.safetensors",
    "ema.safetensors",
    "state.json",
    "MANIFEST",
)

_REPLACED = ".replaced-"
_DISCARDED = ".discarded-"
_NAME = re.compile(r"step-(\d{8,})(\.replaced-\w+)?")
# What a damaged disk or a half-copied folder answers; anything else (no rights, no descriptors) is no fault of the checkpoint.
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP}


@dataclass(slots=True)
class Loaded:
    """What a checkpoint held. Tensors are on the CPU, in the dtype and shape they were saved with."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    """Ready for `optimizer.load_state_dict`."""
    ema: dict[str, Tensor] | None
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in `folder` (`<run>/checkpoints`), of which the last `keep` and the best stay.

    `report` is told, in a sentence, what was found damaged and where it is now. Who saves, cleans or sets aside must hold the run's lock.
    """

    __slots__ = ("folder", "keep", "report")

    def __init__(self, folder: Path, keep: int, report: Callable[[str], None] = print):
        self.folder = folder
        self.keep = keep
        self.report = report

    def save(
        self,
        step: int,
        weights: dict[str, Tensor],
        optimizer: dict[str, Any],
        ema: dict[str, Tensor] | None,
        state: dict[str, Any],
    ) -> Path:
        """Commit the state after `step` steps and return its folder; then delete what is neither recent nor best.

        `optimizer` is a `state_dict()`; `state` is anything JSON has, and its `val_loss`, where finite, is the loss of these weights.
        Raises errors.NonFiniteError where a tensor is not finite, errors.StorageError where the disk does not take it; older ones stay as they were.
        """
        folder = self.folder / f"step-{step:08d}"
        temporary = files.temporary_path(folder)
        with files.storage_errors("save", folder):
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                files.fsync_folder(self.folder.parent)
            temporary.mkdir()
            try:
                self._fill(temporary, step, weights, optimizer, ema, state)
                if os.path.lexists(folder):
                    # A folder cannot be renamed over another. Under this name it still counts, should we die between the two lines.
                    os.rename(folder, folder.with_name(f"{folder.name}{_REPLACED}{uuid.uuid4().hex[:8]}"))
                os.rename(temporary, folder)
            except BaseException:
                self._try_remove(temporary)
                raise
            files.fsync_folder(self.folder)
        self._retain(step)
        return folder

    def newest(self, set_aside: bool = True) -> Loaded | None:
        """The newest good checkpoint; None where there are none at all.

        Damaged newer ones are moved untouched to `<run>/quarantine` and reported (`set_aside=False`, for who does not hold the run's lock:
        only reported). Where every one is damaged nothing is moved, and errors.DataError says what is wrong with each.
        """
        damaged: list[tuple[Path, str]] = []
        for folder in reversed(self._folders()):
            try:
                loaded = self._load(folder)
            except errors.DataError as error:
                damaged.append((folder, str(error)))
                continue
            for bad, reason in damaged:
                where = f"it was moved untouched to {self._set_aside(bad)}" if set_aside else "it is left where it is"
                self.report(
                    f"The checkpoint {bad.name} is damaged ({reason}): {where}, and step {loaded.step} is used instead."
                )
            return loaded
        if damaged:
            reasons = "; ".join(f"{folder.name} ({reason})" for folder, reason in damaged)
            raise errors.DataError(
                f"Every checkpoint in {self.folder} is damaged: {reasons}. Nothing was moved or overwritten. "
                "Restore one of them from a copy, or type fresh=true to begin again in a new folder."
            )
        return None

    def best(self) -> Loaded | None:
        """The good checkpoint of the lowest finite `val_loss` (of equals the earliest); None where none has one. Moves nothing."""
        for folder in self._by_loss():
            try:
                return self._load(folder)
            except errors.DataError as error:
                self.report(
                    f"The checkpoint {folder.name}, the best of what is left, is damaged ({error}): the next best is used instead."
                )
        return None

    def load(self, step: int) -> Loaded:
        """The checkpoint of this step. Raises errors.UsageError where there is none, errors.DataError where it is damaged. Moves nothing."""
        reason = None
        for folder in reversed(self._folders()):
            if _step(folder) == step:
                try:
                    return self._load(folder)
                except errors.DataError as error:
                    reason = reason or error
        if reason:
            raise errors.DataError(f"The checkpoint of step {step} in {self.folder} is damaged: {reason}.")
        there = ", ".join(map(str, self.steps())) or "none"
        raise errors.UsageError(
            f"There is no checkpoint of step {step} in {self.folder}. Those kept are of steps: {there}."
        )

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, in rising order, unverified."""
        return sorted({_step(folder) for folder in self._folders()})

    def clean(self) -> None:
        """Delete what dead processes left unfinished. To be called by the run that holds the lock, before its first save."""
        if self.folder.is_dir():
            with files.storage_errors("clean", self.folder):
                for path in self.folder.iterdir():
                    if path.name.startswith((files.PARTIAL_PREFIX, _DISCARDED)):
                        files.remove(path)

    def _fill(self, folder: Path, step: int, weights: dict, optimizer: dict, ema: dict | None, state: dict) -> None:
        tensors: dict[str, Tensor] = {}
        packed = _pack(optimizer, "", tensors)
        contents = {WEIGHTS: weights, OPTIMIZER: tensors} | ({} if ema is None else {EMA: ema})
        for name, content in contents.items():
            _check_finite(step, name, content)
            tensor_files.save_tensors(folder / name, content)
        (folder / STATE).write_text(json.dumps({"state": state, "optimizer": packed}), encoding="utf-8")
        entries = {}
        for name in [*contents, STATE]:
            files.fsync(folder / name)
            entries[name] = {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size}
        body = json.dumps(
            {"schema": SCHEMA, "step": step, "files": entries}, sort_keys=True, separators=(",", ":")
        ).encode()
        (folder / MANIFEST).write_bytes(_signed(body))
        files.fsync(folder / MANIFEST)
        files.fsync_folder(folder)

    def _folders(self) -> list[Path]:
        """Every checkpoint, whole or not, by step; of one step the one that replaces another comes last. Names count, never times."""
        try:
            found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(found, key=lambda path: (_step(path), _REPLACED not in path.name, path.name))

    def _load(self, folder: Path) -> Loaded:
        """Raises errors.DataError with the reason alone."""
        manifest = _manifest(folder)
        names = [WEIGHTS, OPTIMIZER, STATE] + ([EMA] if EMA in manifest["files"] else [])
        contents = {name: _content(folder, manifest, name) for name in names}
        try:
            return Loaded(
                step=manifest["step"],
                weights=contents[WEIGHTS],
                optimizer=_unpack(contents[STATE]["optimizer"], contents[OPTIMIZER]),
                ema=contents.get(EMA),
                state=contents[STATE]["state"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise errors.DataError(f"{STATE} lacks what a checkpoint needs: {error!r}") from None

    def _by_loss(self) -> list[Path]:
        """The folders with a finite `val_loss` in an undamaged state.json, lowest first."""
        losses = {}
        for folder in self._folders():
            try:
                loss = json.loads(_verified(folder, _manifest(folder), STATE))["state"].get("val_loss")
            except (errors.DataError, ValueError, KeyError, TypeError, AttributeError):
                continue
            if isinstance(loss, int | float) and math.isfinite(loss):
                losses[folder] = loss
        return sorted(losses, key=losses.__getitem__)

    def _retain(self, saved: int) -> None:
        """Delete all but the last `keep`, the best, and the one just saved (the run may have been taken back to an earlier step)."""
        kept = {saved, *self.steps()[-self.keep :], *map(_step, self._by_loss()[:1])}
        for folder in self._folders():
            replaced = _REPLACED in folder.name and (self.folder / f"step-{_step(folder):08d}").is_dir()
            if _step(folder) not in kept or replaced:
                # Renamed first: a folder that is half deleted must not look like a checkpoint.
                discarded = folder.with_name(f"{_DISCARDED}{uuid.uuid4().hex[:8]}-{folder.name}")
                try:
                    os.rename(folder, discarded)
                except OSError as error:
                    self.report(f"The old checkpoint {folder} could not be deleted: {error.strerror}.")
                else:
                    self._try_remove(discarded)

    def _try_remove(self, path: Path) -> None:
        """Delete what no longer counts; what resists is left to `clean`."""
        try:
            files.remove(path)
        except OSError as error:
            self.report(f"{path} could not be deleted: {error.strerror}. The next start tries again.")

    def _set_aside(self, folder: Path) -> Path:
        quarantine = self.folder.parent / "quarantine"
        with files.storage_errors("set aside the damaged checkpoint", folder):
            quarantine.mkdir(exist_ok=True)
            target, number = quarantine / folder.name, 1
            while os.path.lexists(target):
                number += 1
                target = quarantine / f"{folder.name}-{number}"
            os.rename(folder, target)
            files.fsync_folder(quarantine)
            files.fsync_folder(self.folder)
        return target


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name)[1])


def _signed(body: bytes) -> bytes:
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _manifest(folder: Path) -> dict[str, Any]:
    data = _read(folder / MANIFEST)
    body = data.partition(b"\n")[0]
    if data != _signed(body):
        raise errors.DataError(f"{MANIFEST} is torn or altered")
    try:
        manifest = json.loads(body)
        step, schema, entries = manifest["step"], manifest["schema"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise errors.DataError(f"{MANIFEST} cannot be read: {error!r}") from None
    if schema != SCHEMA:
        raise errors.DataError(f"it has the format {schema!r}, and this version of the program reads {SCHEMA}")
    if step != _step(folder) or not isinstance(entries, dict):
        raise errors.DataError(f"{MANIFEST} is that of step {step}")
    return manifest


def _content(folder: Path, manifest: dict[str, Any], name: str) -> dict[str, Any]:
    import safetensors
    from safetensors.torch import load

    data = _verified(folder, manifest, name)
    try:
        return json.loads(data) if name == STATE else load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, AssertionError, RecursionError) as error:
        raise errors.DataError(f"{name} cannot be read: {error}") from None


def _verified(folder: Path, manifest: dict[str, Any], name: str) -> bytes:
    """A file's bytes, read once, so that what was hashed is what is used."""
    entry = manifest["files"].get(name)
    if not isinstance(entry, dict):
        raise errors.DataError(f"{MANIFEST} does not name {name}")
    data = _read(folder / name, entry.get("size"))
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise errors.DataError(f"the bytes of {name} are not those that were saved: their sha256 differs")
    return data


def _read(path: Path, size: int | None = None) -> bytes:
    """A file's bytes; errors.DataError where it is missing or not of this size."""
    with files.storage_errors("read", path):
        try:
            status = path.stat()
            # Asked before it is opened, so that neither a pipe nor an endless device is waited for.
            if not stat.S_ISREG(status.st_mode):
                raise errors.DataError(f"{path.name} is no file")
            if size is not None and status.st_size != size:
                raise errors.DataError(f"{path.name} has {status.st_size} bytes, and {size} were saved")
            return path.read_bytes()
        except OSError as error:
            if error.errno in _DAMAGE:
                raise errors.DataError(f"{path.name}: {error.strerror}") from None
            raise


def _check_finite(step: int, name: str, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        # One-byte floats have no isfinite; integers (8-bit optimizer states) are always finite.
        if (
            not (tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor)
            .isfinite()
            .all()
        ):
            raise errors.NonFiniteError(
                f"Step {step} was not saved: {key!r} of {name} holds a number that is not finite. "
                "The checkpoints before it are untouched; a lower optimizer.lr is the usual remedy."
            )


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors` under their dotted path. Exact: types of containers and keys come back."""
    from torch import Tensor

    def inside(key: object) -> str:
        return f"{name}.{key}" if name else str(key)

    if isinstance(value, Tensor):
        while name in tensors:  # {"a.b": x, "a": {"b": y}}
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        if not all(type(key) in (int, str) for key in value):
            raise TypeError(f"an optimizer's state has keys that JSON does not keep, in {name!r}")
        return {"dict": [[key, _pack(item, inside(key), tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, inside(index), tensors) for index, item in enumerate(value)]}
    if isinstance(value, list):
        return [_pack(item, inside(index), tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"an optimizer's state holds a {type(value).__name__}, which is neither a tensor nor JSON, at {name!r}"
    )


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    return {key: _unpack(item, tensors) for key, item in content}
