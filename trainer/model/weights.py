"""Reading the weights of a checkpoint into a network, and writing them as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainer.core import files, tensor_files
from trainer.core.errors import DataError
from trainer.model import checkpoint_files

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5 * 2**30
"""Largest size of a file of weights. It also bounds the memory that writing a checkpoint takes."""
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
"""Name of diffusers' weight files, without the suffix."""
TRANSFORMERS_WEIGHTS = "model"
"""Name of transformers' weight files, without the suffix."""

Quantize = Callable[[str, "torch.nn.Module", Callable[[str], "torch.Tensor"]], "torch.nn.Module | None"]
"""`quantize(name, layer, read)` returns a quantized layer to put in place of `layer`, or None to keep it.

`layer` is on the meta device; `read(tensor name)` returns its weights.
"""


LEFTOVERS = {
    "*position_ids": "numbers that the network counts itself",
    "*inv_freq": "frequencies that the network computes itself",
    "llm.lm_head.*": "the head of a language model, whose hidden states are read",
    "*scaled_fp8": "a mark of ComfyUI",
}
"""Tensors in published files that no network needs, and why."""
QUANTIZATION = (".SCB", ".input_scale", ".scale_input", ".scale_weight", ".weight_format", ".weight_scale")
"""Ends of the names of tensors that belong to the quantized weight of a layer; others start with the weight's name."""


def is_leftover(name: str) -> bool:
    """Returns whether a tensor of this name is harmless."""
    return any(fnmatch(name, pattern) for pattern in LEFTOVERS)


def required_tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns what the files of a network must hold, by name: its parameters and its persistent buffers."""
    return {name: tensor for name, tensor in network.state_dict().items() if not is_leftover(name)}


def wrong_tensors(place: Path | str, verb: str, names: list[str]) -> DataError:
    """Returns the error about weights that are not those of the network."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return DataError(
        f"The weights in {place} {verb} {', '.join(names[:3])}{more}, so they are not those of the network in its "
        "config; type the path of a complete checkpoint of this model"
    )


def check_tensors(meta_model: torch.nn.Module, found: Iterable[str], place: Path | str) -> None:
    """Raises errors.DataError if the names of tensors in files are not those of a network.

    Tensors of quantized weights and `LEFTOVERS` are accepted.
    """
    known = required_tensors(meta_model).keys()
    found = set(found)
    missing = sorted(known - found)
    if missing:
        raise wrong_tensors(place, "lack", missing)

    def belongs(name: str) -> bool:
        weight, separator, _ = name.rpartition(".weight.")
        if separator:
            return f"{weight}.weight" in known
        return name.endswith(QUANTIZATION) and f"{name.rpartition('.')[0]}.weight" in known

    unknown = sorted(name for name in found - known if not belongs(name) and not is_leftover(name))
    if unknown:
        raise wrong_tensors(place, "also hold", unknown)


class WeightReader(Protocol):
    """Weights by name, each read from the disk when it is asked for."""

    def read(self, name: str) -> torch.Tensor:
        """Returns one tensor, on the CPU. Raises errors.DataError."""

    def dtypes(self) -> dict[str, str]:
        """Returns the dtype of each tensor by name, as safetensors spells it ("F32", "BF16", "F8_E4M3", ...).

        Reads only the headers of the files. Raises errors.DataError.
        """


class ComponentWeights:
    """The weights in the folder of one component, in one safetensors file or in shards.

    Where names in the file start with a `prefix` that the names in the network lack, `read` adds it and `dtypes`
    removes it. Tensors without the prefix are found as well.
    """

    def __init__(self, folder: Path, file_name: str = DIFFUSERS_WEIGHTS, prefix: str = ""):
        self._prefix = prefix
        self._file = folder / f"{file_name}.safetensors"
        self._shards: dict[str, Path] = {}
        index = folder / f"{file_name}.safetensors.index.json"
        if index.exists():
            self._shards = {name: folder / shard for name, shard in checkpoint_files.read_weight_map(index).items()}

    def read(self, name: str) -> torch.Tensor:
        if self._prefix:
            try:
                return self._read(self._prefix + name)
            except DataError:
                pass
        return self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        import safetensors

        path = self._shards.get(name, self._file)
        try:
            with safetensors.safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"{path} does not hold {name} ({error})") from error

    def files(self) -> list[Path]:
        """Returns the paths of the files, which may be missing."""
        return sorted({*self._shards.values()} or {self._file})

    def dtypes(self) -> dict[str, str]:
        import safetensors

        found: dict[str, str] = {}
        for path in self.files():
            try:
                with safetensors.safe_open(path, "pt") as file:
                    found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            except (OSError, safetensors.SafetensorError) as error:
                raise DataError(f"{path} cannot be read as weights ({error})") from error
        return {name.removeprefix(self._prefix): dtype for name, dtype in found.items()}


class CombinedWeights:
    """The weights of a network with several components, where each name starts with the name of its component."""

    def __init__(self, components: Mapping[str, WeightReader]):
        self._components = components

    def read(self, name: str) -> torch.Tensor:
        component, _, own_name = name.partition(".")
        return self._components[component].read(own_name)

    def dtypes(self) -> dict[str, str]:
        return {
            f"{component}.{name}": dtype
            for component, weights in self._components.items()
            for name, dtype in weights.dtypes().items()
        }


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Networks built inside have shapes but no memory: what files hold is on the meta device; see `required_tensors`.

    Other buffers are real, since the network computes them. Large buffers that files hold are computed before they are
    dropped; a network that has no other tensors can be built inside `torch.device("meta")` as well, which avoids that.
    """
    import torch
    from accelerate import init_empty_weights

    # Like accelerate, which does this for parameters. Any: mypy accepts no assignment to a method.
    module_class: Any = torch.nn.Module
    register_buffer = module_class.register_buffer

    def register(module: torch.nn.Module, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        if tensor is not None and persistent and not is_leftover(name):
            tensor = tensor.to("meta")
        register_buffer(module, name, tensor, persistent)

    module_class.register_buffer = register
    try:
        with init_empty_weights():
            yield
    finally:
        module_class.register_buffer = register_buffer


def load_weights(
    meta_model: torch.nn.Module,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantize: Quantize | None = None,
) -> torch.nn.Module:
    """Gives a network on the meta device its weights and returns it, on `device` in `dtype` and in eval mode.

    Like diffusers' `from_pretrained`, this reads persistent buffers too, and leaves whole numbers in their dtype. Each
    tensor is moved to the device before the next is read, so memory holds the network and one more tensor. `quantize`,
    if given, may replace each layer that has weights. Raises errors.DataError if a shape is wrong.
    """
    import torch

    for name, layer in list(meta_model.named_modules()):
        if quantize is not None and any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
            quantized = quantize(name, layer, read)
            if quantized is not None:
                meta_model.set_submodule(name, quantized)
                continue
        for own_name, expected in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if expected.is_meta:
                full_name = f"{name}.{own_name}" if name else own_name
                tensor = read(full_name)
                if tensor.shape != expected.shape:
                    raise DataError(
                        f"the weights' {full_name} has shape {tuple(tensor.shape)}, but the config says "
                        f"{tuple(expected.shape)}"
                    )
                tensor = tensor.to(device, dtype if expected.is_floating_point() else expected.dtype)
                is_parameter = isinstance(expected, torch.nn.Parameter)
                setattr(layer, own_name, torch.nn.Parameter(tensor) if is_parameter else tensor)
    # Moves the buffers that the network computes.
    return meta_model.to(device).eval()


def empty_model(meta_model: torch.nn.Module) -> torch.nn.Module:
    """Moves a network from the meta device to the CPU without using memory: each tensor is a single zero, expanded.

    Libraries load adapters onto the device of the weights, and on the meta device their values would be lost.
    """
    import torch

    for module in meta_model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))
    return meta_model


def save_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, file_name: str = DIFFUSERS_WEIGHTS) -> None:
    """Writes weights as `from_pretrained` reads them, with no more than one shard in memory. Raises OSError.

    `huggingface_hub.split_torch_state_dict_into_shards` needs all tensors at once; here they come from an iterator.
    """
    shard: dict[str, torch.Tensor] = {}
    shard_of: dict[str, int] = {}
    paths: list[Path] = []
    shard_bytes = total_bytes = 0

    def write_shard() -> None:
        paths.append(files.temporary_path(folder / file_name))
        tensor_files.save_tensors(paths[-1], shard, {"format": "pt"})
        shard_of.update(dict.fromkeys(shard, len(paths)))
        shard.clear()

    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            write_shard()
            shard_bytes = 0
        shard[name] = tensor.cpu()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    write_shard()
    # The names hold the number of shards, so files are renamed once it is known.
    names = [f"{file_name}-{i:05d}-of-{len(paths):05d}.safetensors" for i in range(1, len(paths) + 1)]
    if len(paths) == 1:
        names = [f"{file_name}.safetensors"]
    else:
        weight_map = {name: names[number - 1] for name, number in shard_of.items()}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        files.write_json(folder / f"{file_name}.safetensors.index.json", index)
    for path, name in zip(paths, names, strict=True):
        path.rename(folder / name)
