"""What a model family answers. Adding a model is one Python file here and one yaml in conf/model.

A family is a dataclass of its yaml values with behaviour and no live state. It says nothing about optimizers, batches,
logging, noise or loss.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainer.core import files
from trainer.core.errors import DataError, UsageError, WeightsError
from trainer.core.libraries import bitsandbytes

if TYPE_CHECKING:
    import torch

    from trainer.core.files import Digests
    from trainer.dataset.view import TransformedSample

PACKAGE = "package:"
KINDS = {".safetensors", ".json", ".txt", ".model"}
"""What a checkpoint consists of: weights, configs and tokenizers; nothing that holds pickles is read or copied."""
VARIANTS = ["*.fp16.*", "*.non_ema.*"]
"""Second copies of weights, in fewer bits or of other training, which some checkpoints hold beside the ones that are read."""
SHARD = 5 * 2**30
"""Bytes of a file of weights, and so of memory when a checkpoint is written."""
SHARDS = "diffusion_pytorch_model"
"""How diffusers calls a denoiser's files."""


class Dtype(Enum):
    """torch's own names."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(slots=True)
class Suggested:
    """Values that other rooms take from the model where the user has set none."""

    resolution: int = 1024
    steps: int = 1000
    batch: int = 1
    learning_rate: dict[str, float] = field(default_factory=dict)
    """By method: `{lora: 1e-4, full: 1e-5}`."""
    sample_steps: int = 28
    guidance: float = 1.0
    evaluation_images: int = 4
    """Held-out samples drawn at each evaluation."""


class Encoder(Protocol):
    """The frozen parts that make what is cached, and turn latents into pictures; each is loaded when first used."""

    def encode(self, part: str, view: TransformedSample) -> torch.Tensor:
        """One part of one sample as it is seen by `view`."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32."""


@dataclass(slots=True)
class Family:
    """`path` is a diffusers folder, a hub id, or `package:` and a folder of this package."""

    path: str | None = None
    revision: str | None = None
    encoder_dtype: Dtype = Dtype.float32
    suggested: Suggested = field(default_factory=Suggested)

    components = ()
    """Subfolders of the checkpoint that are needed."""
    denoiser = "transformer"
    """The one of them that trains."""
    methods = ("lora", "dora", "lokr", "loha", "full")
    """What its network can be trained by."""
    controls = range(1)
    """How many control pictures a sample may have."""
    classifier_free = False
    """Whether drawing with guidance compares with the prediction without the caption."""
    multiple = 1
    """Pixels by which sides must be divisible."""
    targets = ()
    """Modules that a LoRA adapts where none are named."""
    keep_high = ()
    """Modules whose linear layers are never stored in fewer than 16 bits: dotted names, which stand for all that is in them too."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UsageError(
                "model.path is not set; type model.path=FOLDER (a diffusers folder) or a hub id such as owner/name"
            )

    def parts(self, components: dict[str, str], controls: int) -> dict[str, Recipe]:
        """What is cached of one sample with this many controls, given the digest of each component."""
        raise NotImplementedError

    def spec(self, height: int, width: int, controls: Sequence[tuple[int, int]] = ()) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every cached tensor of one sample of `height` x `width` pixels with control pictures of these (height, width)."""
        raise NotImplementedError

    def caption_tokens(self, captions: Sequence[str]) -> tuple[list[int], int] | None:
        """How many tokens each caption has, and how many the model reads of one; None: it is not known. Needs tokenizers only."""
        return None

    def encoder(self, device: torch.device) -> Encoder:
        raise NotImplementedError

    def meta_model(self) -> torch.nn.Module:
        """Everything live in a step without its weights, built inside `weightless`: the denoiser, with its own names."""
        raise NotImplementedError

    def weights(self, folder: Path | None = None) -> Weights:
        """Where the weights of the skeleton are read: this checkpoint's, or those of another in `folder`."""
        return Weights((folder or self.folder()) / self.denoiser)

    def network(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", stored: Stored | None = None
    ) -> torch.nn.Module:
        """The skeleton with its weights; see `filled`."""
        quiet_libraries()
        return load_weights(self.meta_model(), self.weights(), dtype, device, stored)

    def predict(
        self, network, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor], guidance: float | None = None
    ) -> torch.Tensor:
        """The network's prediction for noisy latents `x` (B, C, h, w) at times `t` (B,) under `cond`, the collated row less the latents."""
        raise NotImplementedError

    def guided(self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
        """Classifier-free guidance (Ho & Salimans 2022) on predictions (B, C, h, w)."""
        return unconditional + guidance * (conditional - unconditional)

    def export_name(self, key: str) -> str:
        """A LoRA key (`<layer>.lora_A.weight`, `<layer>.lora_B.weight`, `<layer>.alpha`) as ComfyUI and diffusers spell it."""
        raise NotImplementedError

    def save_adapter(self, weights: dict[str, torch.Tensor], adapter: dict, path: Path) -> None:
        """Write a LoRA (peft's names and configuration) as the file that diffusers' `load_lora_weights` reads. Raises OSError."""
        raise NotImplementedError

    def load_adapter(self, path: Path) -> torch.nn.Module:
        """The network without weights (see `hollow`), and in it the LoRA of a file in either spelling, by diffusers' own loader."""
        raise NotImplementedError

    def save_checkpoint(self, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
        """Write the whole checkpoint with these weights of the denoiser in it, for `model.path` and diffusers. Raises OSError."""
        for component in self.components:
            shutil.copytree(self.component(component), folder / component, ignore=_unwanted(component == self.denoiser))
        index = self.folder() / "model_index.json"
        if index.exists():
            classes = files.read_json(index)
            # What is not copied (a safety checker, say) is not to be looked for: diffusers marks it so.
            absent = {
                name: [None, None]
                for name, value in classes.items()
                if isinstance(value, list) and name not in self.components
            }
            files.write_json(folder / "model_index.json", classes | absent)
        config = folder / self.denoiser / "config.json"
        # What is written is whole, whatever it was made of.
        files.write_json(
            config, {key: value for key, value in files.read_json(config).items() if key != "quantization_config"}
        )
        save_shards(tensors, folder / self.denoiser)

    @classmethod
    def tiny(cls, folder: Path) -> list[str]:
        """Make a checkpoint of this family with few layers and random weights, offline, and name the settings (key=value) that load it."""
        raise NotImplementedError

    def shift(self, height: int, width: int) -> float:
        """How far times move towards noise at a latent size."""
        return 1.0

    def folder(self) -> Path:
        """Where the checkpoint lies on this machine; a hub id is downloaded (weights, configs and tokenizers only) or found in the hub's cache."""
        if self.path.startswith(PACKAGE):
            return Path(__file__).parents[1] / self.path.removeprefix(PACKAGE)
        wanted = [f"{part}/*{kind}" for part in self.components for kind in sorted(KINDS)]
        return located("path", self.path, self.revision, ["model_index.json", *wanted])

    def component(self, name: str) -> Path:
        """The folder of one component of the checkpoint."""
        return self.folder() / name

    def config(self, component: str) -> dict:
        """The json that describes a component."""
        return read_config(self.component(component))

    def digest(self, digests: Digests) -> dict[str, str]:
        """Component -> digest of its files' names and contents."""
        return {part: _folder_digest(self.component(part), digests) for part in self.components}

    def remarks(self) -> list[str]:
        """What is allowed but perhaps not meant, in a sentence each."""
        return []


def located(key: str, path: str, revision: str | None, wanted: list[str]) -> Path:
    """The folder that the setting `model.<key>` names: one of this machine, or that of a hub id, of which the files `wanted` (glob patterns) are
    downloaded or found in the hub's cache. Raises errors.WeightsError."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise WeightsError(
            f"model.{key}={path}: there is no such folder, and it is no hub id (owner/name); type the path of a diffusers folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted, ignore_patterns=VARIANTS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"model.{key}={path}: the weights are not to be had from the hub ({reason}). Type model.{key}=FOLDER for a copy on this "
            f"machine, or log in (`hf auth login`) after accepting the model's terms on its page"
        ) from error


@dataclass(slots=True, frozen=True)
class Recipe:
    """What a cached part is made from: fields of the sample (see `View.content`: "image", "control", "caption", ...), and the digest of what
    makes it."""

    fields: tuple[str, ...]
    maker: str


def control_names(count: int) -> tuple[str, ...]:
    """What the pictures and the cached parts of so many controls are called; see `View.controls`."""
    return tuple("control" if i == 1 else f"control_{i}" for i in range(1, count + 1))


def recipe_digest(*ingredients: object) -> str:
    """One digest over all that makes a part, on the family's side."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def _folder_digest(folder: Path, digests: Digests) -> str:
    if not folder.is_dir():
        raise WeightsError(
            f"{folder.parent} has no folder {folder.name}/, so it is no checkpoint of this model; type another model.path"
        )
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in KINDS)
    for path in found:
        if path.suffix == ".safetensors":
            # Here, since every library that reads one has its own words for what is wrong, and few name the file.
            files.check_safetensors(path)
    return recipe_digest([(path.relative_to(folder).as_posix(), _file_digest(path, digests)) for path in found])


def _file_digest(path: Path, digests: Digests) -> str:
    # The hub's cache names large files by their sha256, so they need not be read again.
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == 64 and path.resolve().parent.name == "blobs":
        return blob
    return digests.of(path)


@contextmanager
def on_meta_device() -> Iterator[None]:
    """What is built inside has its parameters on the meta device: shapes and names that take no memory. Buffers are made as ever."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        yield


class Weights:
    """The tensors in the files of a component's `folder`, each read from the disk when it is asked for by name. Raises errors.DataError."""

    def __init__(self, folder: Path, name: str = SHARDS):
        index, single = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors"
        self.where = {}
        if index.exists():
            self.where = {name: folder / file for name, file in files.read_json(index)["weight_map"].items()}
        self.single = single

    def __call__(self, name: str) -> torch.Tensor:
        import safetensors

        path = self.where.get(name, self.single)
        try:
            with safetensors.safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"{path} does not hold {name} ({error})") from error

    def types(self) -> dict[str, str]:
        """What safetensors calls the type of each tensor ("F32", "BF16", "F8_E4M3", ...) by name, told from the files' headers."""
        import safetensors

        found = {}
        for path in sorted({*self.where.values()} or {self.single}):
            try:
                with safetensors.safe_open(path, "pt") as file:
                    found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            except (OSError, safetensors.SafetensorError) as error:
                raise DataError(f"{path} cannot be read as weights ({error})") from error
        return found


Stored = Callable[[str, "torch.nn.Module", Callable[[str], "torch.Tensor"]], "torch.nn.Module | None"]
"""(name, layer without weights, a function that reads tensors by name) -> another layer that has its weights, or None."""


def load_weights(
    meta_model: torch.nn.Module,
    read: Weights,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    stored: Stored | None = None,
) -> torch.nn.Module:
    """The skeleton with its weights, read tensor by tensor, each of which is on `device` in `dtype` before the next is read: no more than the
    network itself and one tensor are ever in memory. `stored`, where given, is asked first whether it has another layer for a layer.
    """
    import torch

    for name, layer in list(meta_model.named_modules()):
        if (
            stored is not None
            and any(p.is_meta for p in layer.parameters(recurse=False))
            and (other := stored(name, layer, read))
        ):
            meta_model.set_submodule(name, other)
            continue
        for leaf, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.is_meta:
                path = f"{name}.{leaf}" if name else leaf
                tensor = read(path)
                if tensor.shape != parameter.shape:
                    raise DataError(
                        f"the weights' {path} has shape {tuple(tensor.shape)}, and the config says {tuple(parameter.shape)}"
                    )
                setattr(layer, leaf, torch.nn.Parameter(tensor.to(device, dtype)))
    # Buffers, and what has no weights in the files, from where they were made.
    return meta_model.to(device).eval()


def empty_model(meta_model: torch.nn.Module) -> torch.nn.Module:
    """A network on the meta device, moved to the CPU without taking memory: every weight is one zero, however large its shape.

    Loaders put adapters where the weights lie, and on the meta device they would be lost.
    """
    import torch

    for module in meta_model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return meta_model


def read_config(folder: Path) -> dict:
    """The json that describes a component of a diffusers folder. Raises errors.DataError."""
    path = folder / ("scheduler_config.json" if folder.name == "scheduler" else "config.json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}), so its folder is no checkpoint of this model; type another model.path"
        ) from error


def save_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, name: str = SHARDS) -> None:
    """Write weights as `from_pretrained` reads them, in files of this name. No more than one file's worth is in memory. Raises OSError."""
    held, size, total, paths, where = {}, 0, 0, [], {}

    def flush() -> None:
        paths.append(files.partial(folder / name))
        files.save_tensors(paths[-1], held, {"format": "pt"})
        where.update(dict.fromkeys(held, len(paths)))
        held.clear()

    for key, tensor in tensors:
        if held and size + tensor.nbytes > SHARD:
            flush()
            size = 0
        held[key] = tensor.cpu()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    names = [f"{name}-{i:05d}-of-{len(paths):05d}.safetensors" for i in range(1, len(paths) + 1)]
    if len(paths) == 1:
        names = [f"{name}.safetensors"]
    else:
        index = {"metadata": {"total_size": total}, "weight_map": {key: names[i - 1] for key, i in where.items()}}
        files.write_json(folder / f"{name}.safetensors.index.json", index)
    for path, final in zip(paths, names, strict=True):
        path.rename(folder / final)


def _unwanted(is_denoiser: bool) -> Callable[[str, list[str]], list[str]]:
    """For shutil.copytree: what is no part of a checkpoint, and the denoiser's own weights."""

    def unwanted(folder: str, names: list[str]) -> list[str]:
        weights = [name for name in names if is_denoiser and (".safetensors" in name)]
        return weights + [name for name in names if (Path(folder) / name).is_file() and Path(name).suffix not in KINDS]

    return unwanted


@cache
def quiet_libraries() -> None:
    """Keep the libraries' own bars and hints (of parts that are not used here) off the terminal; downloads keep their bars."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def text_model(kind: type, folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A frozen model of transformers' from the folder of a component, whose weights bitsandbytes may have quantised."""
    quantised = files.read_json(folder / "config.json").get("quantization_config", {})
    if quantised.get("quant_method") == "bitsandbytes":
        bitsandbytes()
    model = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # Else the first pass on some CPUs packs the weights anew, which fails for narrow layers.
            layer.support_avx512bf16_for_cpu = False
    return model.to(device).eval()


def families() -> dict[str, type[Family]]:
    """Every family of this folder by the name of its module; what several share lies in packages."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            name = f"{__name__}.{module.name}"
            members = vars(importlib.import_module(name)).values()
            found[module.name] = next(
                c for c in members if isinstance(c, type) and issubclass(c, Family) and c.__module__ == name
            )
    return found
