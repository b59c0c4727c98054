"""The base class of families whose denoiser is a UNet that reads the states of CLIP text encoders.

Follows diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline: the same tensors reach the UNet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.core import documents, files
from trainer.core.dtypes import Dtype
from trainer.model import Family, Recipe, checkpoint_files, lora_files
from trainer.model.checkpoint_files import recipe_digest
from trainer.model.configs import ConfigRules, class_defaults
from trainer.model.pretrained import quiet_libraries
from trainer.model.single_file_contents import scheduler_mark_names
from trainer.model.unet.checkpoint import UNetCheckpoint
from trainer.model.unet.names import kohya_key, published_name
from trainer.model.unet.scheduler import DDIM, check_scheduler, read_noise_scheduler, scheduler_values
from trainer.model.weights import TRANSFORMERS_WEIGHTS, empty_model, save_shards
from trainer.objective import Diffusion

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch
    from trainer.model.unet.encoder import UNetEncoder


class Posterior(Enum):
    """Which latents of the distribution that the VAE gives for an image are trained on.

    `mean` is its mean; `sample` draws new latents each time a sample is used.
    """

    mean = "mean"
    sample = "sample"


@dataclass(slots=True)
class UNetFamily(UNetCheckpoint):
    """Base class of Stable Diffusion and SDXL."""

    objective: Diffusion = field(default_factory=Diffusion)
    vae_dtype: Dtype = Dtype.float32
    posterior: Posterior = Posterior.sample

    classifier_free_guidance = True
    addition_embed_type: ClassVar[str | None] = None
    """What the UNet reads besides the prompt, by diffusers' name for it."""
    ignores_clipping: ClassVar[bool] = True
    """Whether the pipeline sets `clip_sample=False` and `steps_offset=1`, as StableDiffusionPipeline does."""
    index_keys: ClassVar[Mapping[str, str]] = {
        "requires_safety_checker": "images are not filtered",
        "add_watermarker": "images are not marked",
    }
    caption_tensors: ClassVar[tuple[str, ...]] = ("prompt",)
    """Cached tensors that the text encoders compute from a caption."""

    @property
    def size_multiple(self) -> int:
        return self._vae_scale_factor()

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Attention, as in Hu et al. 2021 and diffusers' examples; CLIP has names of its own."""
        unet = ("to_q", "to_k", "to_v", "to_out.0")
        return (*unet, "q_proj", "k_proj", "v_proj", "out_proj") if self.train_text_encoder else unet

    @property
    def unquantized_modules(self) -> tuple[str, ...]:
        """The layers that embed times and sizes."""
        prefix = "unet." if self.train_text_encoder else ""
        return tuple(f"{prefix}{name}" for name in ("time_embedding", "add_embedding", "*.time_emb_proj"))

    # Implemented by each family

    def encode_tokens(self, encoders: Sequence[Any], token_ids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns `caption_tensors` (B, ...) from the token ids (B, L) for each text encoder."""
        raise NotImplementedError

    def added_conditions(
        self, conditions: Batch, latents: torch.Tensor, guidance: float | None
    ) -> dict[str, torch.Tensor] | None:
        """Returns what the UNet reads besides the prompt, under diffusers' names."""
        return None

    # Cached tensors

    @property
    def encoders(self) -> tuple[str, ...]:
        # The VAE has `vae_dtype`.
        return () if self.train_text_encoder else self.text_encoder_names

    def recipes(self, digests: dict[str, str], controls: int) -> dict[str, Recipe]:
        vae = Recipe(("image",), recipe_digest(digests["vae"], self.vae_dtype.value))
        return dict.fromkeys(self._latent_names(), vae) | {
            name: Recipe(("caption",), self._caption_digest(name, digests)) for name in self._caption_names()
        }

    def shapes(
        self, height: int, width: int, control_sizes: Sequence[tuple[int, int]] = ()
    ) -> dict[str, tuple[int, ...]]:
        channels, scale = self.component_config("vae")["latent_channels"], self._vae_scale_factor()
        caption_shapes = self._caption_shapes()
        return dict.fromkeys(self._latent_names(), (channels, height // scale, width // scale)) | {
            name: caption_shapes[name] for name in self._caption_names()
        }

    def _latent_names(self) -> tuple[str, ...]:
        return ("latents", "latents_std") if self.posterior is Posterior.sample else ("latents",)

    def _caption_names(self) -> tuple[str, ...]:
        """Names of the cached tensors that depend on the caption."""
        if self.train_text_encoder:
            return tuple(f"tokens{suffix}" for suffix in self.text_suffixes)
        return self.caption_tensors

    def _caption_digest(self, name: str, digests: dict[str, str]) -> str:
        """Returns the recipe digest of a cached tensor that depends on the caption."""
        if self.train_text_encoder:
            return recipe_digest(digests[name.replace("tokens", "tokenizer")])
        components = [f"{kind}{suffix}" for kind in ("text_encoder", "tokenizer") for suffix in self.text_suffixes]
        dtypes = self._dtype_key(*self.text_encoder_names)
        return recipe_digest([digests[component] for component in components], dtypes)

    def _dtype_key(self, *encoders: str) -> str | list[str]:
        """Returns the dtypes of encoders for a digest: one name if all have the same."""
        dtypes = [self.encoder_dtype_of(name).value for name in encoders]
        return dtypes[0] if len(set(dtypes)) == 1 else dtypes

    def _caption_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of token ids and of `caption_tensors`."""
        token_shapes = {
            f"tokens{suffix}": (self.component_config(f"text_encoder{suffix}")["max_position_embeddings"],)
            for suffix in self.text_suffixes
        }
        width = self.component_config("unet")["cross_attention_dim"]
        return {**token_shapes, "prompt": (*token_shapes["tokens"], width)}

    def build_encoder(self, device: torch.device) -> UNetEncoder:
        from trainer.model.unet.encoder import UNetEncoder

        quiet_libraries()
        return UNetEncoder(self, device)

    def count_caption_tokens(self, captions: Sequence[str]) -> dict[str, tuple[list[int], int]]:
        # SDXL's second tokenizer has the same vocabulary.
        tokenizer = load_clip_tokenizer(self.component_folder("tokenizer"))
        counts = [len(tokenizer(caption, verbose=False).input_ids) for caption in captions]
        return {"tokenizer": (counts, tokenizer.model_max_length)}

    def tokenize(self, name: str, caption: str) -> torch.Tensor:
        """Returns the token ids of a caption, (L,), truncated or padded; `name` is "tokens" and a suffix."""
        tokenizer = load_clip_tokenizer(self.component_folder(name.replace("tokens", "tokenizer")))
        tokens = tokenizer(
            caption, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids[0]

    # The network

    def predict(
        self, network: Any, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        unet = network
        if self.train_text_encoder:
            unet, *encoders = network.children()
            token_ids = [conditions[f"tokens{suffix}"].long() for suffix in self.text_suffixes]
            conditions = conditions | self.encode_tokens(encoders, token_ids)
        return unet(
            sample=latents,
            timestep=t,
            encoder_hidden_states=conditions["prompt"].to(latents.dtype),
            added_cond_kwargs=self.added_conditions(conditions, latents, guidance),
            return_dict=False,
        )[0]

    # Files

    def save_lora(self, weights: dict[str, torch.Tensor], config: dict[str, Any], path: Path) -> None:
        components: dict[str, dict[str, torch.Tensor]] = {}
        for component, name, tensor in self._split_by_component(weights.items()):
            name = name if component == "unet" else published_name(name)
            components.setdefault(component, {})[name] = tensor
        lora_files.save_lora(self.pipeline_class(), components, config, path)

    def load_lora(self, path: Path) -> torch.nn.Module:
        quiet_libraries()
        network = empty_model(self.meta_model())
        models = dict(network.named_children()) if self.train_text_encoder else {"unet": network}
        lora_files.load_lora(self.pipeline_class(), models, path)
        return network

    def comfyui_key(self, key: str) -> str:
        return kohya_key(key if self.train_text_encoder else f"unet.{key}", len(self.text_suffixes))

    def save_pipeline(self, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
        components = groupby(self._split_by_component(tensors), lambda item: item[0])
        # The UNet comes first. Its tensors are consumed before the next component is asked for.
        _, unet = next(components)
        Family.save_pipeline(self, ((name, tensor) for _, name, tensor in unet), folder)
        for component, group in components:
            for path in (folder / component).glob("*.safetensors*"):
                path.unlink()
            save_shards(
                ((published_name(name), tensor) for _, name, tensor in group), folder / component, TRANSFORMERS_WEIGHTS
            )
        scheduler = self.component_config("scheduler") | self.scheduler_config()
        if scheduler.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in class_defaults(
            scheduler["_class_name"]
        ):
            # The checkpoint's scheduler would ignore it.
            scheduler["_class_name"] = DDIM
            path = folder / "model_index.json"
            if path.exists():
                files.write_json(path, documents.read_json(path) | {"scheduler": ["diffusers", DDIM]})
        if scheduler != checkpoint_files.read_config(folder / "scheduler"):
            files.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)

    def single_file_marks(self) -> tuple[str, ...]:
        return scheduler_mark_names(self.component_config("scheduler") | self.scheduler_config())

    def warnings(self) -> list[str]:
        scheduler = self.component_config("scheduler")
        scheduler = scheduler_values(scheduler)
        differences = [
            f"{name}={scheduler.get(name)} (not {value})"
            for name, value in self.scheduler_config().items()
            # Sampling alone depends on the spacing.
            if name != "timestep_spacing" and scheduler.get(name, value) != value
        ]
        warnings = Family.warnings(self)
        if not differences:
            return warnings
        return [
            *warnings,
            f"The checkpoint was trained with {', '.join(differences)}. A LoRA would be sampled with the checkpoint's "
            "settings, and a full fine-tune first has to learn the new ones. Set model.objective to the checkpoint's "
            "settings, unless the difference is intended",
        ]

    def resolved_objective(self) -> Diffusion:
        path = self.component_folder("scheduler") / "scheduler_config.json"
        config = self.component_config("scheduler")
        check_scheduler(path, config)
        scheduler = read_noise_scheduler(path, config)
        if self.ignores_clipping:
            scheduler = replace(scheduler, clip_sample_range=None, steps_offset=1)
        return self.objective.follow(scheduler)

    def config_rules(self) -> dict[str, ConfigRules]:
        channels = (self.component_config("vae").get("latent_channels", 4),)
        no_statistics = {"shift_factor": (None, 0), "latents_mean": (None,), "latents_std": (None,)}
        unet = {
            "in_channels": channels,
            "out_channels": channels,
            "addition_embed_type": (self.addition_embed_type,),
            "attention_type": ("default",),
            "class_embed_type": (None,),
            "encoder_hid_dim_type": (None,),
            "num_class_embeds": (None,),
            "time_cond_proj_dim": (None,),
        }
        text_encoders = {
            f"text_encoder{suffix}": ConfigRules(self.text_encoder_class(suffix).__name__, model_type="clip_text_model")
            for suffix in self.text_suffixes
        }
        return {
            "vae": ConfigRules("AutoencoderKL", {"in_channels": (3,), "out_channels": (3,), **no_statistics}),
            "unet": ConfigRules("UNet2DConditionModel", unet),
            **text_encoders,
        }

    def scheduler_config(self) -> dict[str, object]:
        """Returns the objective as entries of a diffusers scheduler's config."""
        objective = self.objective
        chosen = {
            "rescale_betas_zero_snr": objective.rescale_betas_zero_snr,
            "timestep_spacing": objective.timestep_spacing and objective.timestep_spacing.value,
        }
        return {
            **{key: value for key, value in chosen.items() if value is not None},
            "prediction_type": self.objective.prediction.value,
            "beta_schedule": self.objective.schedule.value,
            "num_train_timesteps": self.objective.timesteps,
            "beta_start": self.objective.beta_start,
            "beta_end": self.objective.beta_end,
        }

    def _vae_scale_factor(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.component_config("vae")["block_out_channels"]) - 1)


@cache
def load_clip_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer, which is loaded once per process."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)
