"""The contract between a model family and the trainer.

A family is a dataclass of the settings in its yaml file, with behavior and without state. It knows nothing of
optimizers, batches, logging, noise or losses. To add a family, write one module in this package and one yaml file in
`conf/model`; see `Family` for what to implement.

Shapes: B samples, C latent channels, latents of h x w, images of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from trainer.core import files
from trainer.core.dtypes import Dtype
from trainer.core.errors import UsageError
from trainer.model import checkpoint_files, lora_files
from trainer.model.pretrained import quiet_libraries
from trainer.model.weights import ComponentWeights, Quantize, WeightReader, empty_model, load_weights, save_shards

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch
    from trainer.core.digests import Digests
    from trainer.dataset.transform import TransformedSample
    from trainer.objective import Objective


@dataclass(slots=True)
class SuggestedSettings:
    """Values of settings in other config groups that apply where the user has set none."""

    resolution: int = 1024
    steps: int = 1000
    batch: int = 1
    learning_rate: dict[str, float] = field(default_factory=dict)
    """By method: `{lora: 1e-4, full: 1e-5}`."""
    sample_steps: int = 28
    guidance: float = 1.0
    evaluation_images: int = 4
    """Held-out samples for which each evaluation generates an image."""


@dataclass(slots=True, frozen=True)
class Recipe:
    """What a cached tensor is computed from."""

    fields: tuple[str, ...]
    """Fields of the sample: "image", "control", "caption", ...; see `TransformedSample.content_key`."""
    digest: str
    """Digest of everything else: weights, tokenizers and settings."""


class Encoder(Protocol):
    """The frozen autoencoder and text encoders of a family, each loaded when it is first used."""

    def encode(self, name: str, sample: TransformedSample) -> torch.Tensor:
        """Returns one cached tensor of one sample, on the CPU; `name` is a key of `Family.recipes`."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32."""


@dataclass(slots=True)
class Family:
    """Base class of model families.

    `path` is a diffusers folder, a hub id, or `package:` and a folder of this package.
    """

    path: str | None = None
    revision: str | None = None
    encoder_dtype: Dtype = Dtype.float32
    suggested: SuggestedSettings = field(default_factory=SuggestedSettings)

    denoiser: ClassVar[str] = "transformer"
    """Component of the checkpoint that is trained."""
    methods: ClassVar[tuple[str, ...]] = ("lora", "dora", "lokr", "loha", "full")
    """Training methods (options of the config group `method`) that apply to this family."""
    classifier_free_guidance: ClassVar[bool] = False
    """Whether sampling with guidance also predicts without the caption."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UsageError(
                "model.path is not set; type model.path=FOLDER (a diffusers folder) or a hub id such as owner/name"
            )

    # The checkpoint

    @property
    def components(self) -> tuple[str, ...]:
        """Components of the checkpoint that training needs; each has a folder of its own."""
        raise NotImplementedError

    def folder(self) -> Path:
        """Returns the checkpoint's folder; downloads a hub id (weights, configs and tokenizers) if necessary."""
        assert self.path is not None
        patterns = [f"{name}/*{suffix}" for name in self.components for suffix in checkpoint_files.SUFFIXES]
        return checkpoint_files.locate("path", self.path, self.revision, ["model_index.json", *patterns])

    def component_folder(self, component: str) -> Path:
        """Returns the folder of one component."""
        return self.folder() / component

    def component_config(self, component: str) -> dict[str, Any]:
        """Returns the JSON config of one component. Raises errors.DataError."""
        return checkpoint_files.read_config(self.component_folder(component))

    def component_digests(self, digests: Digests) -> dict[str, str]:
        """Returns component -> digest of the names and contents of its files."""
        return {name: checkpoint_files.folder_digest(self.component_folder(name), digests) for name in self.components}

    # Data

    @property
    def size_multiple(self) -> int:
        """Number of pixels by which the sides of images must be divisible."""
        raise NotImplementedError

    @property
    def control_counts(self) -> range:
        """Numbers of control images that a sample may have."""
        return range(1)

    def recipes(self, digests: dict[str, str], controls: int) -> dict[str, Recipe]:
        """Returns name -> recipe of every tensor that is cached for a sample with this many control images.

        One of them is `latents`; `digests` are those of the components.
        """
        raise NotImplementedError

    def shapes(
        self, height: int, width: int, control_sizes: Sequence[tuple[int, int]] = ()
    ) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of every cached tensor of a sample of `height` x `width` pixels.

        `control_sizes` are the (height, width) of its control images. Tensors that are padded in a batch have the
        longest possible length.
        """
        raise NotImplementedError

    def build_encoder(self, device: torch.device) -> Encoder:
        """Returns the encoder, which loads nothing yet."""
        raise NotImplementedError

    def count_caption_tokens(self, captions: Sequence[str]) -> tuple[list[int], int] | None:
        """Returns the number of tokens of each caption, and how many the model reads; None if unknown.

        Loads only tokenizers.
        """
        return None

    # The network

    def meta_model(self) -> torch.nn.Module:
        """Returns everything that takes part in a training step, on the meta device; see `weights.on_meta_device`."""
        raise NotImplementedError

    def weights(self, folder: Path | None = None) -> WeightReader:
        """Returns a reader of the weights of `meta_model`, from this checkpoint or from one in `folder`."""
        return ComponentWeights((folder or self.folder()) / self.denoiser)

    def load_network(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", quantize: Quantize | None = None
    ) -> torch.nn.Module:
        """Returns `meta_model` with its weights; see `weights.load_weights`."""
        quiet_libraries()
        return load_weights(self.meta_model(), self.weights().read, dtype, device, quantize)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Modules that adapters apply to by default, by the ends of their dotted names.

        Each of them must receive a gradient; leave out layers whose output the network discards.
        """
        raise NotImplementedError

    @property
    def unquantized_modules(self) -> tuple[str, ...]:
        """Modules whose linear layers, nested ones included, keep at least 16 bits.

        Dotted names of the whole network, in which `*` matches any characters.
        """
        raise NotImplementedError

    # Training and sampling

    @property
    def objective(self) -> Objective:
        """The training objective; each family declares it as a setting."""
        raise NotImplementedError

    def time_shift(self, height: int, width: int) -> float:
        """Returns the shift of the times towards noise for latents of this size; 1 for none."""
        return 1.0

    def predict(
        self, network: Any, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        """Returns the network's prediction for noisy latents (B, C, h, w) at times `t` (B,), in the same shape.

        `t` is the time of the family's objective: 0 (clean) to 1 (noise) for a flow, the timesteps 0, 1, ... for
        diffusion. A network that expects another unit converts it here.

        `conditions` are the collated cached tensors other than the latents. `guidance` is None in training.
        """
        raise NotImplementedError

    def apply_guidance(self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
        """Combines predictions (B, C, h, w) with and without caption: classifier-free guidance (Ho & Salimans 2022)."""
        return unconditional + guidance * (conditional - unconditional)

    # Exports

    @classmethod
    def pipeline_class(cls) -> Any:
        """Returns the diffusers pipeline class that reads this family's checkpoints and LoRA files."""
        raise NotImplementedError

    def save_lora(self, weights: dict[str, torch.Tensor], config: dict[str, Any], path: Path) -> None:
        """Writes a LoRA (peft's names and configuration) for diffusers' `load_lora_weights`. Raises OSError."""
        lora_files.save_lora(self.pipeline_class(), {self.denoiser: weights}, config, path)

    def load_lora(self, path: Path) -> torch.nn.Module:
        """Returns the network without weights (see `weights.empty_model`) with the LoRA of a diffusers or ComfyUI file.

        Raises what diffusers' loader raises.
        """
        quiet_libraries()
        network = empty_model(self.meta_model())
        lora_files.load_lora(self.pipeline_class(), {self.denoiser: network}, path)
        return network

    def comfyui_key(self, key: str) -> str:
        """Converts a LoRA key (`<layer>.lora_A.weight`, `<layer>.alpha`) to one that ComfyUI and diffusers read."""
        raise NotImplementedError

    def save_pipeline(self, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
        """Writes the checkpoint with these weights of the network, for `model.path` and diffusers. Raises OSError."""
        for name in self.components:
            checkpoint_files.copy_component(
                self.component_folder(name), folder / name, with_weights=name != self.denoiser
            )
        checkpoint_files.copy_model_index(self.folder(), folder, self.components)
        config = self.component_config(self.denoiser)
        # The new weights are not quantized.
        config.pop("quantization_config", None)
        files.write_json(folder / self.denoiser / "config.json", config)
        save_shards(tensors, folder / self.denoiser)

    # Checks

    def warnings(self) -> list[str]:
        """Returns a sentence about each setting that is allowed but may be a mistake."""
        return []

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        """Writes a checkpoint with few layers and random weights, for tests; needs no network connection.

        Returns the overrides (`key=value`) that select it.
        """
        raise NotImplementedError
