"""Export formats of a complete checkpoint with the trained weights merged into it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.core import files
from trainer.core.console import print_line
from trainer.core.errors import DataError, StorageError
from trainer.export import verify
from trainer.export.format import ExportFormat
from trainer.export.verify import WeightChange
from trainer.method.adapter_layers import frozen_tensor, merged_tensor
from trainer.model.weights import required_tensors

if TYPE_CHECKING:
    from trainer.config.schema import Run


class CheckpointFormat(ExportFormat):
    """A format that holds the model with its trained weights."""

    is_folder = True
    """Whether the export is a folder."""

    def write(self, run: Run, network: torch.nn.Module, path: Path) -> None:
        dtype = run.export.dtype.torch if run.export.dtype else run.method.dtype(run.precision.dtype())
        expected = required_tensors(run.model.meta_model())
        _check_space(run, expected.values(), dtype, path)
        replace = files.replace_folder if self.is_folder else files.replace_file
        with replace(path) as unfinished:
            self.save(run, lambda name: verify.cast(merged_tensor(network, name), dtype), expected, dtype, unfinished)
            changes = _weight_changes(run, network, expected)
            preserved = verify.check_checkpoint(run.model.weights(unfinished).read, changes, expected, dtype, path)
            self.check_rest(run, unfinished, path)
        if preserved < verify.MIN_PRESERVED[torch.float32]:
            print_line(
                f"{path}: {verify.dtype_name(dtype)} preserves {preserved:.0%} of the trained change; "
                "export.dtype=float32 preserves all of it"
            )

    def save(
        self,
        run: Run,
        read: Callable[[str], torch.Tensor],
        names: Iterable[str],
        dtype: torch.dtype,
        path: Path,
    ) -> None:
        """Saves the checkpoint; `read` returns the tensors of the network, by `names`, in `dtype`. Raises OSError."""
        raise NotImplementedError

    def check_rest(self, run: Run, unfinished: Path, path: Path) -> None:
        """Compares what the network does not hold with the base, if it was not just copied. Raises errors.DataError."""


class PipelineFormat(CheckpointFormat):
    """A folder for `model.path` and diffusers."""

    def save(
        self,
        run: Run,
        read: Callable[[str], torch.Tensor],
        names: Iterable[str],
        dtype: torch.dtype,
        path: Path,
    ) -> None:
        run.model.save_pipeline(((name, read(name)) for name in names), path)


class SingleFileFormat(CheckpointFormat):
    """A file for `model.path` or the setting of the denoiser's name, A1111 and ComfyUI."""

    is_folder = False

    def save(
        self,
        run: Run,
        read: Callable[[str], torch.Tensor],
        names: Iterable[str],
        dtype: torch.dtype,
        path: Path,
    ) -> None:
        run.model.save_single_file(read, dtype, path)

    def check_rest(self, run: Run, unfinished: Path, path: Path) -> None:
        model = run.model
        for component in model.file_prefixes:
            if component not in model.components:
                continue
            base, written = model.component_weights(component), model.component_weights(component, unfinished)
            for name in required_tensors(model.meta_component(component)):
                frozen = model.network_name(component, name) is None
                if frozen and not torch.equal(base.read(name), written.read(name)):
                    raise DataError(
                        f"{path} was written and read back, and {name} of the {component} differs from the base. It "
                        "was discarded; please report this"
                    )


def _check_space(run: Run, tensors: Iterable[torch.Tensor], dtype: torch.dtype, path: Path) -> None:
    """Raises errors.StorageError if the disk has no space for the checkpoint beside an earlier one."""
    needed = sum(tensor.numel() for tensor in tensors) * dtype.itemsize
    model = run.model
    copied = [name for name in model.components if name != model.denoiser]
    single_files = {file for name in copied if (file := model.component_file(name)) is not None}
    folders = [model.component_folder(name) for name in copied if model.component_file(name) is None]
    needed += sum(file.stat().st_size for file in single_files)
    needed += sum(
        file.stat().st_size for folder in folders for file in folder.rglob("*") if file.suffix in model.suffixes
    )
    with files.storage_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise StorageError(
            f"Could not write {path}: it takes {needed / 2**30:.1f} GiB, and the disk has {free / 2**30:.1f} GiB free. "
            "The trained weights are in the run's checkpoint: free some disk space and type the same command again, or "
            "type it with export.formats=[] for no export"
        )


def _weight_changes(run: Run, network: torch.nn.Module, names: Iterable[str]) -> Iterator[WeightChange]:
    """Yields the change of each tensor of the network. Before and after are equal if it was not trained."""
    original = None if run.method.is_adapter else run.model.weights()
    for name in names:
        after = merged_tensor(network, name)
        # Weights that train in bfloat16 were rounded when they were loaded. The rounding is not part of the change.
        before = original.read(name).to(after.device, after.dtype) if original else frozen_tensor(network, name)
        yield WeightChange(name, before.float(), after.float())
