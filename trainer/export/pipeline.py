"""Export format of a complete checkpoint with the trained weights merged into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.core import files
from trainer.core.console import print_line
from trainer.export import verify
from trainer.export.format import ExportFormat
from trainer.export.verify import WeightChange
from trainer.method.adapter_layers import frozen_tensor, merged_tensor

if TYPE_CHECKING:
    from trainer.config.schema import Run


class PipelineFormat(ExportFormat):
    """A folder for `model.path` and diffusers."""

    def write(self, run: Run, network: torch.nn.Module, path: Path) -> None:
        dtype = run.export.dtype.torch if run.export.dtype else run.precision.dtype()
        shapes = {name: tensor.shape for name, tensor in run.model.meta_model().state_dict().items()}
        with files.replace_folder(path) as unfinished:
            run.model.save_pipeline(((name, merged_tensor(network, name).to(dtype)) for name in shapes), unfinished)
            changes = _weight_changes(run, network, shapes)
            preserved = verify.check_checkpoint(run.model.weights(unfinished).read, changes, shapes, dtype, path)
        if preserved < verify.MIN_PRESERVED[torch.float32]:
            print_line(
                f"{path}: {verify.dtype_name(dtype)} preserves {preserved:.0%} of the trained change; "
                "export.dtype=float32 preserves all of it"
            )


def _weight_changes(run: Run, network: torch.nn.Module, names: Iterable[str]) -> Iterator[WeightChange]:
    """Yields the change of each tensor of the network. Before and after are equal if it was not trained."""
    original = None if run.method.is_adapter else run.model.weights()
    for name in names:
        after = merged_tensor(network, name)
        if original is None:
            before = frozen_tensor(network, name)
        else:
            # Weights that train in bfloat16 were rounded when they were loaded. The rounding is not part of the change.
            before = original.read(name).to(after.device, network.get_parameter(name).dtype)
        yield WeightChange(name, before.float(), after.float())
