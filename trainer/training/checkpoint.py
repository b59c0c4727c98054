"""The checkpoints of a run: which ones are kept, and which one is used.

A checkpoint is written under a temporary name and renamed once all of it is on the disk, so a folder with the name of
a checkpoint is complete. `checkpoint_format` describes the files inside.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core import files
from trainer.core.console import print_line
from trainer.core.errors import DataError, UsageError
from trainer.training.checkpoint_format import (
    REPLACED,
    Checkpoint,
    folder_name,
    is_checkpoint,
    read_checkpoint,
    read_val_loss,
    step_of,
    write_checkpoint,
)

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in a run folder."""
_DISCARDED = ".discarded-"


class Checkpoints:
    """The checkpoints in `folder` (`<run>/checkpoints`), of which the last `keep` and the best are kept.

    `report` receives a sentence for each damaged checkpoint that is found. A process must hold the lock of the run to
    save, to clean, or to set damaged checkpoints aside.
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
        """Saves the state after `step` steps, and deletes checkpoints that are neither recent nor the best.

        Returns the folder of the new checkpoint. `optimizer` is a `state_dict()`; for `state` see `Checkpoint`.

        Raises errors.NonFiniteError if a tensor is not finite, and errors.StorageError if the disk is full or fails.
        Existing checkpoints are then unchanged.
        """
        folder = self.folder / folder_name(step)
        temporary = files.temporary_path(folder)
        with files.storage_errors("save", folder):
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                files.fsync_folder(self.folder.parent)
            temporary.mkdir()
            try:
                write_checkpoint(temporary, Checkpoint(step, weights, optimizer, ema, state))
                if os.path.lexists(folder):
                    # A folder cannot be renamed over another one. If the process dies before the next line, the old
                    # checkpoint is still found under this name.
                    os.rename(folder, folder.with_name(f"{folder.name}{REPLACED}{uuid.uuid4().hex[:8]}"))
                os.rename(temporary, folder)
            except BaseException:
                self._try_remove(temporary)
                raise
            files.fsync_folder(self.folder)
        self._retain(step)
        return folder

    def newest(self, set_aside: bool = True) -> Checkpoint | None:
        """Returns the newest undamaged checkpoint; None if there are no checkpoints at all.

        Newer, damaged ones are reported and moved unchanged to `<run>/quarantine`; with `set_aside=False` they are
        only reported. If all checkpoints are damaged, none is moved, and errors.DataError gives the reason for each.
        """
        damaged: list[tuple[Path, str]] = []
        for folder in reversed(self._folders()):
            try:
                checkpoint = read_checkpoint(folder)
            except DataError as error:
                damaged.append((folder, str(error)))
                continue
            for bad, reason in damaged:
                where = f"it was moved unchanged to {self._set_aside(bad)}" if set_aside else "it is left where it is"
                self.report(
                    f"The checkpoint {bad.name} is damaged ({reason}): {where}, "
                    f"and step {checkpoint.step} is used instead."
                )
            return checkpoint
        if damaged:
            reasons = "; ".join(f"{folder.name} ({reason})" for folder, reason in damaged)
            raise DataError(
                f"Every checkpoint in {self.folder} is damaged: {reasons}. Nothing was moved or overwritten. "
                "Restore one of them from a copy, or type fresh=true to start again in a new folder."
            )
        return None

    def best(self) -> Checkpoint | None:
        """Returns the undamaged checkpoint with the lowest finite `val_loss`, the earliest if several are equal.

        Returns None if no checkpoint has a finite loss.
        """
        for folder in self._folders_by_loss():
            try:
                return read_checkpoint(folder)
            except DataError as error:
                self.report(
                    f"The checkpoint {folder.name}, the best one left, is damaged ({error}): "
                    "the next best is used instead."
                )
        return None

    def load(self, step: int) -> Checkpoint:
        """Returns the checkpoint of a step.

        Raises errors.UsageError if there is none, and errors.DataError if it is damaged.
        """
        reason = None
        for folder in reversed(self._folders()):
            if step_of(folder) == step:
                try:
                    return read_checkpoint(folder)
                except DataError as error:
                    reason = reason or error
        if reason:
            raise DataError(f"The checkpoint of step {step} in {self.folder} is damaged: {reason}.")
        steps = ", ".join(map(str, self.steps())) or "none"
        raise UsageError(f"There is no checkpoint of step {step} in {self.folder}. Steps with a checkpoint: {steps}.")

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints in ascending order, without verifying them."""
        return sorted({step_of(folder) for folder in self._folders()})

    def clean(self) -> None:
        """Deletes the unfinished files of dead processes. Call it before the first save."""
        if self.folder.is_dir():
            with files.storage_errors("clean", self.folder):
                for path in self.folder.iterdir():
                    if path.name.startswith((files.PARTIAL_PREFIX, _DISCARDED)):
                        files.remove(path)

    def _folders(self) -> list[Path]:
        """Returns all checkpoints in the order of their steps, including damaged ones.

        If there are two of one step, the new one comes last. The order follows from names alone, since copying a folder
        changes the times of its files.
        """
        try:
            found = [path for path in self.folder.iterdir() if is_checkpoint(path)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(found, key=lambda path: (step_of(path), REPLACED not in path.name, path.name))

    def _folders_by_loss(self) -> list[Path]:
        """Returns the checkpoints with a finite `val_loss`, lowest first."""
        losses = {folder: loss for folder in self._folders() if (loss := read_val_loss(folder)) is not None}
        return sorted(losses, key=losses.__getitem__)

    def _retain(self, saved_step: int) -> None:
        """Deletes all checkpoints but the last `keep`, the best, and the one just saved.

        The one just saved may be older than others: a run can restart from an earlier step.
        """
        retained = {saved_step, *self.steps()[-self.keep :], *map(step_of, self._folders_by_loss()[:1])}
        for folder in self._folders():
            replaced = REPLACED in folder.name and (self.folder / folder_name(step_of(folder))).is_dir()
            if step_of(folder) not in retained or replaced:
                # Renamed first: a partly deleted folder must not look like a checkpoint.
                discarded = folder.with_name(f"{_DISCARDED}{uuid.uuid4().hex[:8]}-{folder.name}")
                try:
                    os.rename(folder, discarded)
                except OSError as error:
                    self.report(f"The old checkpoint {folder} could not be deleted: {error.strerror}.")
                else:
                    self._try_remove(discarded)

    def _try_remove(self, path: Path) -> None:
        """Deletes a folder that is no longer a checkpoint. If this fails, `clean` tries again."""
        try:
            files.remove(path)
        except OSError as error:
            self.report(f"{path} could not be deleted: {error.strerror}. The next start tries again.")

    def _set_aside(self, folder: Path) -> Path:
        """Moves a damaged checkpoint to `<run>/quarantine`; returns its new path."""
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


def load_best_weights(run_folder: Path) -> tuple[int, dict[str, Tensor]]:
    """Returns the step and the weights to use from a run: those with the lowest held-out loss, else the last.

    If the run keeps a moving average, it is that of the weights. Raises errors.DataError if there is no checkpoint.
    """
    checkpoints = Checkpoints(run_folder / CHECKPOINTS, 1, print_line)
    checkpoint = checkpoints.best() or checkpoints.newest(set_aside=False)
    if checkpoint is None:
        raise DataError(f"{run_folder} has no checkpoint yet; train until the first one is saved")
    return checkpoint.step, checkpoint.ema or checkpoint.weights
