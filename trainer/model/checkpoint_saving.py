"""Writing a base model with new weights: as a diffusers folder, and as a single file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core import files
from trainer.model import checkpoint_files
from trainer.model.checkpoint import Checkpoint
from trainer.model.weights import required_tensors, save_shards

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class SavableCheckpoint(Checkpoint):
    """A base model whose network can be written with new weights, beside copies of its other components."""

    def network_name(self, component: str, name: str) -> str | None:
        """Returns the name in the network of a component's tensor; None if the network does not hold it."""
        return name if component == self.denoiser else None

    def save_pipeline(self, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
        """Writes the checkpoint with these weights of the network, for `model.path` and diffusers. Raises OSError."""
        for name in self.components:
            in_folder = name != self.denoiser and self.component_file(name) is None
            checkpoint_files.copy_component(self.component_folder(name), folder / name, in_folder, self.suffixes)
            if name != self.denoiser and not in_folder:
                self.save_component(name, folder / name)
        checkpoint_files.copy_model_index(self.folder(), folder, self.components)
        config = self.component_config(self.denoiser)
        # The new weights are not quantized.
        config.pop("quantization_config", None)
        files.write_json(folder / self.denoiser / "config.json", config)
        save_shards(tensors, folder / self.denoiser)

    def save_component(self, component: str, folder: Path) -> None:
        """Writes the weights of a component of a single file as diffusers reads them. Raises OSError."""
        weights = self.component_weights(component)
        save_shards(((name, weights.read(name)) for name in required_tensors(self.meta_component(component))), folder)

    def save_single_file(self, read: Callable[[str], torch.Tensor], dtype: torch.dtype, path: Path) -> None:
        """Writes the checkpoint as one file in the layout of the original program. Raises OSError.

        `read` returns the tensors of the network by name, in `dtype`.
        """
        from trainer.model.single_file_writer import SingleFileWriter

        SingleFileWriter(self, read, dtype).save(path)

    def single_file_marks(self) -> tuple[str, ...]:
        """Returns the names of empty tensors that tell readers of a single file how it was trained."""
        return ()
