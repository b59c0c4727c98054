"""Writes a base model with new weights as one safetensors file in the layout of the original program."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from trainer.core.tensor_files import SAFETENSORS_NAMES, stream_tensors
from trainer.model.single_file import Form, Location, Piece, TensorFile, file_shape
from trainer.model.single_file_contents import DROPPED, reason_not_read
from trainer.model.weights import required_tensors

if TYPE_CHECKING:
    from trainer.model.checkpoint_saving import SavableCheckpoint
    from trainer.model.weights import WeightReader

TORCH_DTYPES = {name: getattr(torch, dtype.removeprefix("torch.")) for dtype, name in SAFETENSORS_NAMES.items()}


class _Part(NamedTuple):
    """A piece of a tensor in the file, and the tensor of a component that has its values."""

    piece: Piece
    location: Location
    component: str
    name: str


class SingleFileWriter:
    """Collects what a single file of `family` holds: `trained` returns the tensors of the network, by name.

    Other components and what else is in the family's own single file are copied as they are, except moving averages
    of the weights, which are those of the base.
    """

    def __init__(self, family: SavableCheckpoint, trained: Callable[[str], torch.Tensor], dtype: torch.dtype):
        self._family, self._trained, self._dtype = family, trained, dtype
        self._weights: dict[str, WeightReader] = {}
        self._parts: dict[str, list[_Part]] = {}
        self._specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._copied: dict[str, TensorFile] = {}
        for component in family.file_prefixes:
            if component in family.components:
                self._add_component(component)
        for key in family.single_file_marks():
            self._specs[key] = (torch.float32, (0,))
        self._add_rest()

    def save(self, path: Path) -> None:
        """Writes the file with one tensor in memory at a time. Raises OSError."""
        stream_tensors(path, self._specs, self._read)

    def _add_component(self, component: str) -> None:
        family = self._family
        layout, prefix = family.original_layout(component), family.file_prefixes[component][0]
        self._weights[component] = family.component_weights(component)
        dtypes = self._weights[component].dtypes()
        for name, tensor in required_tensors(family.meta_component(component)).items():
            location = layout(name)
            in_network = family.network_name(component, name) is not None and tensor.is_floating_point()
            dtype = self._dtype if in_network else TORCH_DTYPES[dtypes[name]]
            for piece in location.pieces:
                key = prefix + piece.key
                self._specs[key] = (dtype, file_shape(location, piece, tuple(tensor.shape)))
                self._parts.setdefault(key, []).append(_Part(piece, location, component, name))

    def _add_rest(self) -> None:
        """Adds the tensors of the family's single file that it does not read."""
        family = self._family
        path = family.base_file()
        if path is None:
            return
        file = TensorFile(path)
        for key in family.not_read().get(path, ()):
            if (
                key not in self._specs
                and reason_not_read(key)
                and not any(fnmatchcase(key, pattern) for pattern in DROPPED)
            ):
                self._copied[key] = file
                self._specs[key] = (TORCH_DTYPES[file.dtypes[key]], file.shapes[key])

    def _read(self, key: str) -> torch.Tensor:
        if key in self._copied:
            return self._copied[key].read(key)
        if key not in self._parts:
            dtype, shape = self._specs[key]
            return torch.zeros(shape, dtype=dtype)
        parts = sorted(self._parts[key], key=lambda part: part.piece.first)
        pieces = [self._read_piece(part) for part in parts]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return tensor.to(self._specs[key][0])

    def _read_piece(self, part: _Part) -> torch.Tensor:
        """Returns the rows of a tensor of a component that belong into a piece of the file, in the form of the file."""
        in_network = self._family.network_name(part.component, part.name)
        read = self._weights[part.component].read
        tensor = read(part.name) if in_network is None else self._trained(in_network)
        if part.location.form is Form.transposed:
            return tensor.T
        if part.location.form is Form.convolution:
            return tensor[..., None, None]
        sizes = [piece.last - piece.first for piece in part.location.pieces]
        before = sum(sizes[: part.location.pieces.index(part.piece)])
        if len(sizes) == 1:
            return tensor
        rows = len(tensor) // sum(sizes)
        return tensor[before * rows : (before + part.piece.last - part.piece.first) * rows]
