"""The contract between a model family and the trainer.

A family is a dataclass of the settings in its yaml file, with behavior and without state. It knows nothing of
optimizers, batches, logging, noise or losses. To add a family, write one module in this package and one yaml file in
`conf/model`. What raises NotImplementedError must be written; the rest has defaults.

Shapes: B samples, C latent channels, latents of h x w, images of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from trainer.core.dtypes import Dtype
from trainer.core.settings import added
from trainer.model import lora_files
from trainer.model.checkpoint_saving import SavableCheckpoint
from trainer.model.configs import ConfigRules, check_checkpoint
from trainer.model.encoder_dtypes import check_encoder_dtypes, encoder_warnings
from trainer.model.pretrained import quiet_libraries
from trainer.model.weights import Quantize, WeightReader, check_tensors, empty_model, load_weights

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch
    from trainer.dataset.transform import TransformedSample
    from trainer.objective import Objective


@dataclass(slots=True)
class SuggestedSettings:
    """Values of settings in other config groups that apply where the user has set none; see `config.compose.resolve`.

    They come from the family's yaml file.
    """

    precision: str = "bf16"
    """Type of frozen weights and of products with `precision=auto`: fp32, bf16 or fp16."""
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
class Family(SavableCheckpoint):
    """Base class of model families.

    What a family says of its files (`components`, `denoiser`, `original_layout`, ...) is declared by `Checkpoint`,
    which reads them, and `SavableCheckpoint`, which writes them.
    """

    encoder_dtype: Dtype = Dtype.float32
    encoder_dtypes: dict[str, Dtype] = added(default_factory=dict)
    """Other dtypes for some of the `encoders`, by component."""
    suggested: SuggestedSettings = field(default_factory=SuggestedSettings)

    methods: ClassVar[tuple[str, ...]] = ("lora", "dora", "lokr", "loha", "full")
    """Training methods (options of the config group `method`) that apply to this family."""
    classifier_free_guidance: ClassVar[bool] = False
    """Whether sampling with a guidance above 1 also predicts without the caption."""
    unsupported_formats: ClassVar[Mapping[str, str]] = {}
    """Export formats (`config.sections.Format`) that do not exist for this family, and why."""
    alpha_tensors: ClassVar[bool] = True
    """Whether diffusers' LoRA loader reads the alpha of a layer from a tensor. If not, files for ComfyUI have none."""
    index_keys: ClassVar[Mapping[str, str]] = {}
    """Keys of `model_index.json` besides the components, and what becomes of them."""

    def __post_init__(self) -> None:
        SavableCheckpoint.__post_init__(self)
        check_encoder_dtypes(self.encoder_dtypes, self.encoders)

    # Data

    @property
    def size_multiple(self) -> int:
        """Number of pixels by which the sides of images must be divisible."""
        raise NotImplementedError

    @property
    def control_counts(self) -> range:
        """Numbers of control images that a sample may have."""
        return range(1)

    @property
    def text_fields(self) -> tuple[str, ...]:
        """Texts that samples must have besides the caption; see `Dataset.text_fields`."""
        return ()

    def recipes(self, digests: dict[str, str], controls: int) -> dict[str, Recipe]:
        """Returns name -> recipe of every tensor that is cached for a sample with this many control images.

        `digests` are those of the components. One tensor is `latents` (C, h, w). With `latents_std` of the same shape,
        each use of the sample draws its latents from this normal distribution. All others condition the network; the
        names in `core.batch.RESERVED` are the trainer's own.

        In a micro-batch, tensors of one name differ at most in their first dimension, and are padded with zeros at its
        end. If the network must not read padding, cache a mask of ones with the same length too.
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

    @property
    def encoders(self) -> tuple[str, ...]:
        """Components that `build_encoder` loads in the dtype of `encoder_dtype_of`."""
        return tuple(name for name in self.components if name == "vae" or name.startswith("text_encoder"))

    def encoder_dtype_of(self, component: str) -> Dtype:
        """Returns the dtype of one of the `encoders`. It is part of the digests in `recipes`."""
        return self.encoder_dtypes.get(component, self.encoder_dtype)

    def build_encoder(self, device: torch.device) -> Encoder:
        """Returns the encoder, which loads nothing yet."""
        raise NotImplementedError

    def count_caption_tokens(self, captions: Sequence[str]) -> dict[str, tuple[list[int], int]]:
        """Returns tokenizer -> the number of tokens of each caption, and how many the model reads; empty if unknown.

        Loads only tokenizers.
        """
        return {}

    # The network

    def meta_model(self) -> torch.nn.Module:
        """Returns everything that takes part in a training step, on the meta device; see `weights.on_meta_device`.

        It is a network of diffusers, or offers two methods that diffusers' have:
        - `enable_gradient_checkpointing()`. A class of diffusers needs `_supports_gradient_checkpointing`.
        - `compile_repeated_blocks()`. A class of diffusers needs `_repeated_blocks`.

        Without one, the setting `hardware.gradient_checkpointing` or `hardware.compile` is refused. Persistent buffers
        are read and exported like weights, and do not train.
        """
        raise NotImplementedError

    def meta_component(self, component: str) -> torch.nn.Module:
        """See `Checkpoint.meta_component`."""
        if component != self.denoiser:
            raise NotImplementedError
        return self.meta_model()

    def weights(self, checkpoint: Path | None = None) -> WeightReader:
        """Returns a reader of the weights of `meta_model`, from this checkpoint or from a folder or single file."""
        return self.component_weights(self.denoiser, checkpoint)

    def load_network(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", quantize: Quantize | None = None
    ) -> torch.nn.Module:
        """Returns `meta_model` with its weights; see `weights.load_weights`."""
        quiet_libraries()
        network = self.meta_model()
        self.check_tensors(network)
        return load_weights(network, self.weights().read, dtype, device, quantize)

    def check_tensors(self, meta_model: torch.nn.Module) -> None:
        """Checks that the files hold the weights of `meta_model` and no others; reads headers. Raises DataError."""
        check_tensors(meta_model, self.weights().dtypes(), f"model.path={self.path}")

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
        """The training objective, a setting: `objective: Flow = field(default_factory=Flow)`, or `Diffusion`."""
        raise NotImplementedError

    def resolved_objective(self) -> Objective:
        """Returns the objective, with what the settings leave to the checkpoint's scheduler.

        Raises errors.DataError, UsageError.
        """
        return self.objective

    def config_rules(self) -> dict[str, ConfigRules]:
        """Returns component -> what its config may say. Components that are not here have no model."""
        return {}

    def check_configs(self) -> None:
        """Checks that all that the checkpoint's configs say is followed. Raises errors.DataError, UsageError."""
        folders = {name: self.component_folder(name) for name in self.components}
        present = {name: folder for name, folder in folders.items() if folder.is_dir()}
        check_checkpoint(present, self.config_rules(), self.folder() / "model_index.json", self.index_keys)
        self.resolved_objective()

    def time_shift(self, height: int, width: int, steps: int | None = None) -> float:
        """Returns the shift of the times towards noise for latents of this size; 1 for none.

        `steps` is the number of sampling steps, None in training.
        """
        return 1.0

    def sampling_times(self, steps: int, height: int, width: int) -> list[float]:
        """Returns the times of sampling for latents of this size; see `Objective.sampling_times`.

        A family whose pipeline samples at other times overrides it.
        """
        return self.resolved_objective().sampling_times(steps, self.time_shift(height, width, steps))

    def sample(
        self, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, steps: int
    ) -> torch.Tensor:
        """Returns latents sampled from `noise` (B, C, h, w) with `predict(noisy latents, t)`.

        A family whose pipeline has a different solver overrides it.
        """
        times = self.sampling_times(steps, *noise.shape[-2:])
        return self.resolved_objective().sample(predict, noise, times)

    def predict(
        self, network: Any, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        """Returns the network's prediction for noisy latents (B, C, h, w) at times `t` (B,), in the same shape.

        - For a `Flow`, `t` goes from 0 (clean) to 1 (noise), and the prediction is noise - clean latents.
        - For a `Diffusion`, `t` is a whole timestep from 0 (almost clean) to `timesteps` - 1 (noise), stored as a
          float, and the prediction is the noise, or v.

        If the network expects another unit of time or predicts the opposite sign, convert it here.

        `conditions` are the collated cached tensors other than the latents; see `recipes`. `guidance` is None in
        training and for the held-out loss. In sampling it is `sample.guidance`, which a distilled network reads; with
        `classifier_free_guidance` and above 1, each step also predicts with the conditions of an empty caption.

        Latents and `t` are float32, and cached tensors have the dtype that the encoder returned. If
        `precision.compute` is 16-bit, `torch.autocast` is on. It casts the inputs of matrix products, but not those of
        sums and concatenations: cast conditions to the dtype of the latents. The prediction may have any float dtype.
        """
        raise NotImplementedError

    def apply_guidance(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float, t: torch.Tensor
    ) -> torch.Tensor:
        """Combines predictions (B, C, h, w) with and without caption: classifier-free guidance (Ho & Salimans 2022).

        `t` (B,) are the times of the predictions. It is not called if `guidance` is 1 or less.
        """
        return unconditional + guidance * (conditional - unconditional)

    # Adapter files and checkpoints for diffusers. Adapters are also read by the names in `original_layout`.

    @classmethod
    def pipeline_class(cls) -> Any:
        """Returns the diffusers pipeline class that reads this family's checkpoints and LoRA files."""
        raise NotImplementedError

    def save_lora(self, weights: dict[str, torch.Tensor], config: dict[str, Any], path: Path) -> None:
        """Writes a LoRA (peft's names and configuration) for diffusers' `load_lora_weights`. Raises OSError.

        If the pipeline class has no LoRA loader, list `diffusers` in `unsupported_formats`; or override this and
        `load_lora` to write another program's file.
        """
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
        """Converts a LoRA key (`<layer>.lora_A.weight`, `<layer>.alpha`) to one that ComfyUI and diffusers read.

        If ComfyUI does not know the model, list `comfyui` in `unsupported_formats`.
        """
        raise NotImplementedError

    def published_layer(self, component: str, layer: str) -> str:
        """Returns the name of a component's layer in published files."""
        return layer

    def other_layer_names(self, name: str) -> tuple[str, ...]:
        """Returns further names in adapter files of a layer with this name in the original program."""
        return ()

    # Checks

    def warnings(self) -> list[str]:
        """Returns a sentence about each setting that is allowed but may be a mistake."""
        return [*self.checkpoint_warnings(), *encoder_warnings(self)]

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        """Writes a checkpoint with few layers and random weights, for tests; needs no network connection.

        Returns the overrides (`key=value`) that select it.
        """
        raise NotImplementedError
