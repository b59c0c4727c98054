"""Export format of a soft prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.config.identity import to_plain
from trainer.core import files, tensor_files
from trainer.core.dtypes import Dtype
from trainer.core.errors import DataError
from trainer.export.format import ExportFormat
from trainer.method.soft_prompt import SoftPrompt
from trainer.method.trainable import trainable_parameters

if TYPE_CHECKING:
    from trainer.config.schema import Run


class SoftPromptFormat(ExportFormat):
    """A file for `method.init_from`. Its metadata holds the settings of the method."""

    def write(self, run: Run, network: torch.nn.Module, path: Path) -> None:
        assert isinstance(run.method, SoftPrompt)
        weights = {name: parameter.detach().cpu() for name, parameter in trainable_parameters(network).items()}
        initial = {
            f"soft_prompt.{name}": tensor.cpu()
            for name, tensor in run.method.initial_prompt(network, run.seed).state_dict().items()
        }
        if all(torch.equal(tensor, initial[name]) for name, tensor in weights.items()):
            raise DataError(
                f"The soft prompt for {path} equals the one that training started with; type a different optimizer.lr"
            )
        dtype = (run.export.dtype or Dtype.float32).torch
        expected = {name: tensor.to(dtype) for name, tensor in weights.items()}
        metadata = {"format": "pt", "method": json.dumps(to_plain(run.method))}
        with files.replace_file(path) as unfinished:
            tensor_files.save_tensors(unfinished, expected, metadata)
            found = tensor_files.load_tensors(unfinished)
            if found.keys() != expected.keys() or not all(
                torch.equal(found[name], tensor) for name, tensor in expected.items()
            ):
                raise DataError(
                    f"{path} was written and read back, and differs from the trained soft prompt. It was discarded"
                )
