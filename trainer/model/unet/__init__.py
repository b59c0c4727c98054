"""What the families share whose denoiser is a UNet that reads CLIP's words: all but the words themselves.

Follows diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline: the tensors that reach the UNet are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core import files
from trainer.core.errors import DataError
from trainer.model import (
    Dtype,
    Family,
    Recipe,
    Weights,
    empty_model,
    located,
    on_meta_device,
    quiet_libraries,
    read_config,
    recipe_digest,
    save_shards,
)
from trainer.objective import Diffusion

if TYPE_CHECKING:
    import torch

    from trainer.model.unet.encoder import UNetEncoder

TEXT_WEIGHTS = "model"
"""How transformers calls a text encoder's files."""
OLDER = "text_model."
"""Stands before the names of a text encoder's tensors in all published files; transformers 5 leaves it out of CLIPTextModel."""


class Posterior(Enum):
    """Which of the latents that the VAE holds possible for a picture is trained on: the `mean`, or another `sample` at each visit."""

    mean = "mean"
    sample = "sample"


@dataclass(slots=True)
class UNet(Family):
    """`vae` is another VAE than the checkpoint's: a diffusers folder or a hub id. With `train_text_encoder` the method applies to the text
    encoders as well, which then read token ids in every step."""

    objective: Diffusion = field(default_factory=Diffusion)
    vae: str | None = None
    vae_dtype: Dtype = Dtype.float32
    posterior: Posterior = Posterior.sample
    train_text_encoder: bool = False

    denoiser = "unet"
    classifier_free = True
    texts = ("",)
    """What stands behind "text_encoder", "tokenizer" and "tokens" in the names of each text encoder and what belongs to it."""
    words = ("prompt",)
    """Cached parts that text encoders make of a caption."""

    @property
    def components(self) -> tuple[str, ...]:
        return (
            "vae",
            *(f"text_encoder{text}" for text in self.texts),
            *(f"tokenizer{text}" for text in self.texts),
            "unet",
            "scheduler",
        )

    @property
    def multiple(self) -> int:
        return self._scale()

    @property
    def targets(self) -> tuple[str, ...]:
        """Attention, as in Hu et al. 2021 and diffusers' examples; of text encoders under CLIP's names."""
        attention = ("to_q", "to_k", "to_v", "to_out.0")
        return (*attention, "q_proj", "k_proj", "v_proj", "out_proj") if self.train_text_encoder else attention

    @property
    def keep_high(self) -> tuple[str, ...]:
        """The layers through which times and sizes go."""
        prefix = "unet." if self.train_text_encoder else ""
        return tuple(f"{prefix}{name}" for name in ("time_embedding", "add_embedding", "*.time_emb_proj"))

    def parts(self, components: dict[str, str], controls: int) -> dict[str, Recipe]:
        picture = Recipe(("image",), recipe_digest(components["vae"], self.vae_dtype.value))
        return dict.fromkeys(self._latent_parts(), picture) | {
            part: Recipe(("caption",), self._word_maker(part, components)) for part in self._word_parts()
        }

    def spec(self, height: int, width: int, controls: Sequence[tuple[int, int]] = ()) -> dict[str, tuple[int, ...]]:
        latents = (self.config("vae")["latent_channels"], height // self._scale(), width // self._scale())
        words = self._word_shapes()
        return dict.fromkeys(self._latent_parts(), latents) | {part: words[part] for part in self._word_parts()}

    def encoder(self, device: torch.device) -> UNetEncoder:
        from trainer.model.unet.encoder import UNetEncoder

        quiet_libraries()
        return UNetEncoder(self, device)

    def meta_model(self) -> torch.nn.Module:
        from diffusers import UNet2DConditionModel

        with on_meta_device():
            unet = UNet2DConditionModel.from_config(self.config("unet"))
            if not self.train_text_encoder:
                return unet
            from trainer.model.unet.live import TrainableUNet

            kinds = {f"text_encoder{text}": self.text_class(text) for text in self.texts}
            return TrainableUNet(
                unet, {name: kind(kind.config_class(**self.config(name))) for name, kind in kinds.items()}
            )

    def weights(self, folder: Path | None = None) -> Weights:
        unet = Family.weights(self, folder)
        if not self.train_text_encoder:
            return unet
        texts = [f"text_encoder{text}" for text in self.texts]
        return LiveWeights(
            {"unet": unet, **{name: Weights((folder or self.folder()) / name, TEXT_WEIGHTS) for name in texts}}
        )

    def predict(
        self, network, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor], guidance: float | None = None
    ) -> torch.Tensor:
        unet = network
        if self.train_text_encoder:
            unet, *encoders = network.children()
            cond = cond | self.read(encoders, [cond[f"tokens{text}"].long() for text in self.texts])
        return unet(
            sample=x,
            timestep=t,
            encoder_hidden_states=cond["prompt"].to(x.dtype),
            added_cond_kwargs=self.added(cond, x, guidance),
            return_dict=False,
        )[0]

    # What the families answer themselves

    @classmethod
    def text_class(cls, text: str) -> type:
        """transformers' class of the text encoder of this name's end."""
        raise NotImplementedError

    @classmethod
    def pipeline(cls) -> type:
        """diffusers' pipeline class."""
        raise NotImplementedError

    def read(self, encoders: Sequence[torch.nn.Module], tokens: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """`words` (B, ...) as the text encoders make them of the token ids (B, L) of each."""
        raise NotImplementedError

    def added(
        self, cond: dict[str, torch.Tensor], x: torch.Tensor, guidance: float | None
    ) -> dict[str, torch.Tensor] | None:
        """What the UNet is told beside the prompt, in diffusers' names."""
        return None

    # What is cached

    def _latent_parts(self) -> tuple[str, ...]:
        return ("latents", "latents_std") if self.posterior is Posterior.sample else ("latents",)

    def _word_parts(self) -> tuple[str, ...]:
        return tuple(f"tokens{text}" for text in self.texts) if self.train_text_encoder else self.words

    def _word_maker(self, part: str, components: dict[str, str]) -> str:
        """The digest of all that makes this part of a caption."""
        if self.train_text_encoder:
            return recipe_digest(components[part.replace("tokens", "tokenizer")])
        return recipe_digest(
            [components[f"{what}{text}"] for what in ("text_encoder", "tokenizer") for text in self.texts],
            self.encoder_dtype.value,
        )

    def _word_shapes(self) -> dict[str, tuple[int, ...]]:
        lengths = {
            f"tokens{text}": (self.config(f"text_encoder{text}")["max_position_embeddings"],) for text in self.texts
        }
        return lengths | {"prompt": (*lengths["tokens"], self.config("unet")["cross_attention_dim"])}

    # Words

    def caption_tokens(self, captions: Sequence[str]) -> tuple[list[int], int]:
        read = tokenizer(self.component("tokenizer"))
        return [len(read(caption, verbose=False).input_ids) for caption in captions], read.model_max_length

    def tokens(self, text: str, caption: str) -> torch.Tensor:
        """Token ids of a caption, (L,), cut or filled up to the tokenizer's length."""
        read = tokenizer(self.component(f"tokenizer{text}"))
        return read(
            caption, padding="max_length", max_length=read.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids[0]

    def text_encoder(self, text: str, dtype: torch.dtype) -> torch.nn.Module:
        kind = self.text_class(text)
        return kind.from_pretrained(self.folder(), subfolder=f"text_encoder{text}", dtype=dtype, use_safetensors=True)

    # Files

    def component(self, name: str) -> Path:
        if name != "vae" or self.vae is None:
            return Family.component(self, name)
        wanted = ["config.json", "diffusion_pytorch_model.safetensors"]
        found = located("vae", self.vae, None, [*wanted, *(f"vae/{file}" for file in wanted)])
        return found / "vae" if (found / "vae").is_dir() else found

    def remarks(self) -> list[str]:
        asked, scheduler = self._noise(), self.config("scheduler")
        other = [
            f"{name}={scheduler[name]} and not {value}"
            for name, value in asked.items()
            if scheduler.get(name, value) != value
        ]
        if not other:
            return []
        return [
            f"The checkpoint was trained with {', '.join(other)}: a LoRA will be drawn with by the checkpoint's own, a full fine-tune has to "
            "learn the other one first. Set model.objective as the checkpoint has it, unless that is meant"
        ]

    def _noise(self) -> dict[str, object]:
        """The objective in the words of diffusers' schedulers."""
        own = self.objective
        bounds = {"beta_start": own.beta_start, "beta_end": own.beta_end}
        return {
            "prediction_type": own.prediction.value,
            "beta_schedule": own.schedule.value,
            "num_train_timesteps": own.timesteps,
        } | bounds

    def _scale(self) -> int:
        """Pixels a latent pixel."""
        return 2 ** (len(self.config("vae")["block_out_channels"]) - 1)

    def export_name(self, key: str) -> str:
        # kohya's names, which ComfyUI and diffusers both read; of the UNet's layers in diffusers' numbering, which both know too.
        layer, kind = _split(key if self.train_text_encoder else f"unet.{key}")
        part, _, layer = layer.partition(".")
        if part != "unet":
            layer = _published(layer)
            part = f"te{part.removeprefix('text_encoder').replace('_', '') or (1 if len(self.texts) > 1 else '')}"
        kind = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}.get(kind, kind)
        return f"lora_{part}_{layer.replace('.', '_')}.{kind}"

    def save_adapter(self, weights: dict[str, torch.Tensor], adapter: dict, path: Path) -> None:
        # Without the metadata a loader takes alpha for the rank; with the dropout in it a pipeline would draw with dropout.
        metadata, arguments = adapter | {"lora_dropout": 0.0, "inference_mode": True}, {}
        for part, tensors in self._by_part(weights).items():
            if part != "unet":
                tensors = {_published(name): tensor for name, tensor in tensors.items()}
            arguments |= {f"{part}_lora_layers": tensors, f"{part}_lora_adapter_metadata": metadata}
        with files.from_safetensors(path):
            self.pipeline().save_lora_weights(path.parent, weight_name=path.name, **arguments)

    def load_adapter(self, path: Path) -> torch.nn.Module:
        quiet_libraries()
        network, pipeline = empty_model(self.meta_model()), self.pipeline()
        encoders = dict(network.named_children()) if self.train_text_encoder else {}
        unet = encoders.pop("unet", network)
        weights, alphas, metadata = pipeline.lora_state_dict(
            path.parent,
            weight_name=path.name,
            unet_config=unet.config,
            return_lora_metadata=True,
            local_files_only=True,
            use_safetensors=True,
        )
        shared = {"network_alphas": alphas, "metadata": metadata, "low_cpu_mem_usage": True}
        pipeline.load_lora_into_unet(weights, unet=unet, **shared)
        for name, encoder in encoders.items():
            pipeline.load_lora_into_text_encoder(weights, text_encoder=encoder, prefix=name, **shared)
        return network

    def save_checkpoint(self, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
        parts = (
            (part, ((name, tensor) for _, name, tensor in group))
            for part, group in groupby(self._parted(tensors), lambda item: item[0])
        )
        # The UNet comes first, and takes what is its own before the next part is asked for.
        Family.save_checkpoint(self, next(parts)[1], folder)
        for part, group in parts:
            for path in (folder / part).glob("*.safetensors*"):
                path.unlink()
            save_shards(((_published(name), tensor) for name, tensor in group), folder / part, TEXT_WEIGHTS)
        scheduler = read_config(folder / "scheduler")
        if scheduler | self._noise() != scheduler:
            files.write_json(folder / "scheduler" / "scheduler_config.json", scheduler | self._noise())

    def _by_part(self, weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Weights of the network by the component that they belong to, in that component's own names."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for part, name, tensor in self._parted(weights.items()):
            parts.setdefault(part, {})[name] = tensor
        return parts

    def _parted(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, str, torch.Tensor]]:
        for name, tensor in tensors:
            part, _, own = name.partition(".") if self.train_text_encoder else ("unet", "", name)
            yield part, own, tensor


class LiveWeights:
    """Those of several components, each under its component's name; see `trainer.model.Weights`."""

    def __init__(self, parts: dict[str, Weights]):
        self.parts = parts

    def __call__(self, name: str) -> torch.Tensor:
        part, _, own = name.partition(".")
        try:
            return self.parts[part](own if part == "unet" else _published(own))
        except DataError:
            return self.parts[part](own)

    def types(self) -> dict[str, str]:
        return {
            f"{part}.{name}": kind for part, weights in self.parts.items() for name, kind in weights.types().items()
        }


def _split(key: str) -> tuple[str, str]:
    """An adapter's key -> its layer, and what it holds of it."""
    kinds = (".lora_", ".alpha", ".dora_", ".lokr_", ".hada_", ".magnitude")
    at = next(key.rfind(kind) for kind in kinds if kind in key)
    return key[:at], key[at + 1 :]


def _published(name: str) -> str:
    """A text encoder's tensor as published files call it."""
    return name if name.startswith((OLDER, "text_projection")) else OLDER + name


@cache
def tokenizer(folder: Path):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)
