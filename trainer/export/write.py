"""Exports the trained weights: writes them in each format, reads them back and compares."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.config.sections import Format
from trainer.core import files
from trainer.core.console import print_line
from trainer.core.errors import DataError
from trainer.distributed.sharding import is_sharded
from trainer.export.adapters import ComfyUIFormat, DiffusersFormat, PeftFormat
from trainer.export.format import ExportFormat
from trainer.export.pipeline import PipelineFormat, SingleFileFormat
from trainer.export.soft_prompt import SoftPromptFormat
from trainer.method.adapter_probe import is_noop
from trainer.method.trainable import swap_weights, trainable_parameters

if TYPE_CHECKING:
    from trainer.config.schema import Run

FORMATS: dict[Format, ExportFormat] = {
    Format.diffusers: DiffusersFormat(),
    Format.peft: PeftFormat(),
    Format.comfyui: ComfyUIFormat(),
    Format.pipeline: PipelineFormat(),
    Format.single_file: SingleFileFormat(),
    Format.soft_prompt: SoftPromptFormat(),
}
UNFINISHED_SECONDS = 24 * 3600
"""An unfinished file or folder that is older than this was left by a process that has died."""


def export_after_training(
    run: Run, network: torch.nn.Module, weights: dict[str, torch.Tensor], folder: Path
) -> list[Path]:
    """Exports at the end of training; see `write_exports`.

    A sharded network can only be exported as an adapter. For another one, prints what to type when the run is finished.
    """
    sharded = any(is_sharded(parameter) for parameter in trainable_parameters(network).values())
    if run.export.formats is None and not run.method.freezes and sharded:
        print_line(
            "no export yet: each process holds a shard of the network. Type python -m trainer stage=export "
            f"run={folder.parent} for a pipeline with the trained weights"
        )
        return []
    return write_exports(run, network, weights, folder)


def write_exports(run: Run, network: torch.nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> list[Path]:
    """Writes `weights`, the trained parameters of `network` by name, to `folder` in each selected format.

    Returns the paths of the exports. They replace earlier exports in the same formats.

    Raises errors.DataError if an export differs from the trained weights or if training has changed nothing, and
    errors.StorageError if an export cannot be written. The earlier export then stays as it was.
    """
    formats = run.export.select(run.method.formats, run.model.unsupported_formats)
    _remove_unfinished(folder)
    network.eval()
    parameters = trainable_parameters(network)
    with (
        torch.no_grad(),
        swap_weights(network, {name: weights[name].to(parameter.device) for name, parameter in parameters.items()}),
    ):
        if run.method.is_adapter and is_noop(network):
            raise DataError(
                f"The adapter for {folder} changes nothing: training has not moved its weights. Look at "
                "train/grad_norm and train/lr in the run's metrics.csv, and type a different optimizer.lr"
            )
        for format in formats:
            FORMATS[format].write(run, network, folder / format.value)
    return [folder / format.value for format in formats]


def _remove_unfinished(folder: Path) -> None:
    """Removes the unfinished files and folders of processes that have died."""
    with files.storage_errors("clean", folder):
        for path in folder.glob(f"{files.PARTIAL_PREFIX}*"):
            if time.time() - path.stat().st_mtime > UNFINISHED_SECONDS:
                files.remove(path)
