"""Weights in one safetensors file, in the layout of the program that a model was published with.

Stable Diffusion's original code, A1111, ComfyUI and kohya's scripts keep the UNet, the VAE and the text encoders in one
file; FLUX's keeps the transformer. Names differ from those of diffusers, and some tensors hold several of diffusers'
tensors. A `Layout` says where each is; it serves to read and to write.

diffusers converts such files too (`diffusers.loaders.single_file_utils`), but only whole components in memory and in
one direction. Here each tensor is read when it is asked for, so that it can be quantized before the next is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trainer.core.errors import DataError, WeightsError

if TYPE_CHECKING:
    import torch

SUFFIX = ".safetensors"
OTHER_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".gguf")
"""Files of weights in formats that are not read."""
SCALES = ("scale_weight", "weight_scale")
"""Names of the scale of a float8 weight, beside the weight."""


class Form(Enum):
    """How the values of a tensor are arranged in the file."""

    same = "same"
    transposed = "transposed"
    convolution = "convolution"
    """A matrix, as the weight of a convolution with a kernel of one pixel."""


class Piece(NamedTuple):
    """Rows of a tensor in the file: from `first` to `last`, if all rows are `of` equal parts."""

    key: str
    first: int = 0
    last: int = 1
    of: int = 1


class Location(NamedTuple):
    """Where a tensor is in the file: in pieces that follow each other along the first axis."""

    pieces: tuple[Piece, ...]
    form: Form = Form.same


Layout = Callable[[str], Location]
"""Returns the location of a tensor of a component, by its name in the network; without the component's prefix."""


def same_names(name: str) -> Location:
    """The layout of files that use diffusers' names."""
    return Location((Piece(name),))


def is_file_name(path: str) -> bool:
    """Returns whether a setting names one file of weights, and not a folder or a hub id."""
    local = Path(path).expanduser()
    return local.is_file() or (local.suffix.lower() in (SUFFIX, *OTHER_SUFFIXES) and not local.is_dir())


def find_file(setting: str, path: str) -> Path:
    """Returns the file that the setting `model.<setting>` names. Raises errors.WeightsError if it cannot be read."""
    found = Path(path).expanduser()
    if not found.is_file():
        raise WeightsError(f"model.{setting}={path}: there is no such file; type the path of a safetensors file")
    if found.suffix.lower() == SUFFIX:
        return found
    if found.suffix.lower() == ".gguf":
        remedy = "type the path of the safetensors file that it was made from"
    else:
        remedy = (
            "it may be a pickle, which can run code when it is loaded. If you trust it, convert it: python -c 'import "
            f'torch, safetensors.torch as s; d = torch.load("{found.name}", map_location="cpu", weights_only=True); '
            'd = d.get("state_dict", d); s.save_file({k: v.clone().contiguous() for k, v in d.items() if '
            f'isinstance(v, torch.Tensor)}}, "{found.stem}{SUFFIX}")\', and type model.{setting}={found.stem}{SUFFIX}'
        )
    raise WeightsError(
        f"model.{setting}={path} is not a safetensors file, the only format of weights that is read; {remedy}"
    )


class TensorFile:
    """An open safetensors file."""

    def __init__(self, path: Path):
        """Reads the header. Raises errors.DataError if it is damaged."""
        import safetensors

        self.path = path
        try:
            self._file = safetensors.safe_open(path, "pt")
            slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(
                f"{path} is not a valid safetensors file ({error}). Restore it, or type a different one."
            ) from error
        self.shapes = {key: tuple(found.get_shape()) for key, found in slices.items()}
        self.dtypes = {key: found.get_dtype() for key, found in slices.items()}
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def read(self, key: str, piece: Piece | None = None) -> torch.Tensor:
        """Returns a tensor, or only these rows of it. Raises errors.DataError."""
        import safetensors

        try:
            if piece is None or piece.of == 1 or not self.shapes[key]:
                return self._file.get_tensor(key)
            first, last = (number * self.shapes[key][0] // piece.of for number in (piece.first, piece.last))
            return self._file.get_slice(key)[first:last]
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"{self.path} does not hold {key} ({error})") from error


class FileWeights:
    """The weights of one component in a file; see `trainer.model.weights.WeightReader`."""

    def __init__(self, file: TensorFile, shapes: Mapping[str, tuple[int, ...]], layout: Layout, prefix: str):
        """`shapes` are those of the component's tensors in the network."""
        self.file, self.prefix = file, prefix
        self._shapes = shapes
        self._locations = {name: _with_prefix(layout(name), prefix) for name in shapes}

    @cached_property
    def missing(self) -> list[str]:
        """Tensors of the network that the file lacks."""
        return [name for name, location in self._locations.items() if not self._has(location)]

    @property
    def names(self) -> Iterable[str]:
        """Names of the tensors in the network."""
        return self._locations

    def keys(self) -> set[str]:
        """Returns the names of all tensors in the file that belong to this component."""
        pieces = {piece.key for location in self._locations.values() for piece in location.pieces}
        scales = {key for piece in pieces for key in _scale_keys(piece).values()}
        return (pieces | scales) & self.file.shapes.keys()

    def wrong_shapes(self) -> list[str]:
        """Returns a phrase for each tensor whose shape in the file is not that in the network."""
        phrases = []
        for name, location in self._locations.items():
            for piece in location.pieces:
                found = self.file.shapes[piece.key]
                if found != file_shape(location, piece, self._shapes[name]):
                    shape = self._shapes[name]
                    phrases.append(f"{piece.key} has shape {found}, and the config says {shape} for {name}")
        return phrases

    def read(self, name: str) -> torch.Tensor:
        import torch

        if name not in self._locations:
            return self._read_scale(name)
        location = self._locations[name]
        pieces = [self.file.read(piece.key, piece) for piece in location.pieces]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if location.form is Form.transposed:
            return tensor.T.contiguous()
        return tensor.flatten(1) if location.form is Form.convolution else tensor

    def dtypes(self) -> dict[str, str]:
        found = {}
        for name, location in self._locations.items():
            key = location.pieces[0].key
            found[name] = self.file.dtypes[key]
            layer = name.removesuffix("weight")
            for leaf, scale in _scale_keys(key).items():
                if scale in self.file.dtypes:
                    found[layer + leaf] = self.file.dtypes[scale]
        return found

    def _read_scale(self, name: str) -> torch.Tensor:
        """Returns the scale of a float8 weight: one number, or one for each row."""
        layer, _, leaf = name.rpartition(".")
        location = self._locations.get(f"{layer}.weight")
        key = _scale_keys(location.pieces[0].key).get(leaf) if location else None
        if location is None or key is None or key not in self.file.shapes:
            raise DataError(f"{self.file.path} does not hold {name}")
        one_for_all = self.file.shapes[key] in ((), (1,), (1, 1))
        return self.file.read(key, None if one_for_all else location.pieces[0])

    def _has(self, location: Location) -> bool:
        return all(piece.key in self.file.shapes for piece in location.pieces)


def find_weights(
    file: TensorFile, shapes: Mapping[str, tuple[int, ...]], layouts: Iterable[Layout], prefixes: Iterable[str]
) -> FileWeights:
    """Returns the weights of a component by the first layout and prefix with which none is missing.

    If there is none, returns those of which the fewest are missing.
    """
    prefixes = tuple(prefixes)
    candidates = (FileWeights(file, shapes, layout, prefix) for layout in layouts for prefix in prefixes)
    best = next(candidates)
    for candidate in candidates:
        if not best.missing:
            break
        if len(candidate.missing) < len(best.missing):
            best = candidate
    return best


def file_shape(location: Location, piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the tensor in the file that holds a piece of a tensor of this shape in the network."""
    if location.form is Form.transposed:
        return shape[::-1]
    if location.form is Form.convolution:
        return (*shape, 1, 1)
    if location.pieces == (piece,) and piece.of == 1:
        return shape
    share = sum(other.last - other.first for other in location.pieces)
    return (shape[0] * piece.of // share, *shape[1:])


def _with_prefix(location: Location, prefix: str) -> Location:
    return location._replace(pieces=tuple(piece._replace(key=prefix + piece.key) for piece in location.pieces))


def _scale_keys(key: str) -> dict[str, str]:
    """Returns, for the key of a weight, the possible keys of its scale by their last part."""
    layer, _, leaf = key.rpartition(".")
    return {scale: f"{layer}.{scale}" for scale in SCALES} if leaf == "weight" else {}
