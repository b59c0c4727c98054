"""The files of a base model with a UNet, a VAE and CLIP text encoders, and the networks that they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.core.settings import added, path_setting
from trainer.model import Family
from trainer.model.pretrained import load_text_encoder, load_vae
from trainer.model.single_file import Layout, TensorFile
from trainer.model.single_file_contents import scheduler_marks
from trainer.model.unet.names import TEXT_MODEL, published_name
from trainer.model.weights import (
    TRANSFORMERS_WEIGHTS,
    CombinedWeights,
    ComponentWeights,
    WeightReader,
    load_weights,
    on_meta_device,
    required_tensors,
    save_shards,
)

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class UNetCheckpoint(Family):
    """`vae` and `unet` replace the checkpoint's: a diffusers folder, a hub id or a safetensors file.

    With `train_text_encoder` the method applies to the text encoders too, and each step runs them on token ids.
    """

    vae: str | None = path_setting(None)
    unet: str | None = added(None, path=True)
    train_text_encoder: bool = False

    denoiser = "unet"
    file_prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "unet": ("model.diffusion_model.", "diffusion_model.", ""),
        "vae": ("first_stage_model.", "vae.", ""),
        "text_encoder": ("cond_stage_model.transformer.",),
    }
    text_suffixes: ClassVar[tuple[str, ...]] = ("",)
    """One for each text encoder: what follows "text_encoder", "tokenizer" and "tokens" in its names."""

    @classmethod
    def text_encoder_class(cls, suffix: str) -> Any:
        """Returns the transformers class of a text encoder."""
        raise NotImplementedError

    @property
    def text_encoder_names(self) -> tuple[str, ...]:
        """Components that are text encoders."""
        return tuple(f"text_encoder{suffix}" for suffix in self.text_suffixes)

    @property
    def components(self) -> tuple[str, ...]:
        tokenizers = [f"tokenizer{suffix}" for suffix in self.text_suffixes]
        return ("vae", *self.text_encoder_names, *tokenizers, "unet", "scheduler")

    def component_config(self, component: str) -> dict[str, Any]:
        config = Family.component_config(self, component)
        file = self.component_file("unet") if component == "scheduler" else None
        return config if file is None else config | scheduler_marks(TensorFile(file))

    # Networks

    def meta_model(self) -> torch.nn.Module:
        unet = self.meta_component("unet")
        if not self.train_text_encoder:
            return unet
        from trainer.model.unet.network import UNetWithTextEncoders

        return UNetWithTextEncoders(unet, {name: self.meta_component(name) for name in self.text_encoder_names})

    def meta_component(self, component: str) -> torch.nn.Module:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        config = self.component_config(component)
        with on_meta_device():
            if component in ("unet", "vae"):
                return (UNet2DConditionModel if component == "unet" else AutoencoderKL).from_config(config)
            kind = self._text_encoder_kind(component)
            return kind(kind.config_class(**config))

    def weights(self, checkpoint: Path | None = None) -> WeightReader:
        if not self.train_text_encoder:
            return self.component_weights("unet", checkpoint)
        names = ("unet", *self.text_encoder_names)
        return CombinedWeights({name: self.component_weights(name, checkpoint) for name in names})

    def folder_weights(self, component: str, folder: Path) -> WeightReader:
        if not component.startswith("text_encoder"):
            return ComponentWeights(folder)
        # In classes with a head, the names in the network start with it too.
        in_network = f"{self._text_encoder_kind(component).base_model_prefix}." == TEXT_MODEL
        return ComponentWeights(folder, TRANSFORMERS_WEIGHTS, "" if in_network else TEXT_MODEL)

    def original_layout(self, component: str) -> Layout:
        from trainer.model.unet import original

        if component == "unet":
            return original.unet_layout(self.component_config(component))
        return original.vae_layout(self.component_config(component)) if component == "vae" else original.clip_layout

    def _text_encoder_kind(self, component: str) -> Any:
        return self.text_encoder_class(component.removeprefix("text_encoder"))

    def load_text_encoder(self, suffix: str, device: torch.device) -> Any:
        """Returns a frozen text encoder."""
        name = f"text_encoder{suffix}"
        dtype = self.encoder_dtype_of(name).torch
        if self.component_file(name) is not None:
            return load_weights(self.meta_component(name), self.component_weights(name).read, dtype, device)
        return load_text_encoder(self.text_encoder_class(suffix), self.component_folder(name), dtype, device)

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> Any:
        """Returns the frozen VAE."""
        from diffusers import AutoencoderKL

        if self.component_file("vae") is not None:
            return load_weights(self.meta_component("vae"), self.component_weights("vae").read, dtype, device)
        return load_vae(AutoencoderKL, self.component_folder("vae"), dtype, device)

    # Saving

    def save_component(self, component: str, folder: Path) -> None:
        if not component.startswith("text_encoder"):
            return Family.save_component(self, component, folder)
        weights = self.component_weights(component)
        names = required_tensors(self.meta_component(component))
        return save_shards(((published_name(name), weights.read(name)) for name in names), folder, TRANSFORMERS_WEIGHTS)

    def network_name(self, component: str, name: str) -> str | None:
        if not self.train_text_encoder:
            return Family.network_name(self, component, name)
        return f"{component}.{name}" if component in ("unet", *self.text_encoder_names) else None

    def published_layer(self, component: str, layer: str) -> str:
        return layer if component == "unet" else published_name(layer)

    def _split_by_component(
        self, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yields (component, name in the component, tensor) for tensors of the network."""
        for name, tensor in tensors:
            if self.train_text_encoder:
                component, _, own_name = name.partition(".")
                yield component, own_name, tensor
            else:
                yield "unet", name, tensor
