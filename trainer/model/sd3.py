"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a flow transformer that reads the states of two CLIPs and of T5.

Follows diffusers' StableDiffusion3Pipeline: the same tensors reach the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core.errors import UsageError
from trainer.core.settings import added
from trainer.model import Family, Recipe
from trainer.model.checkpoint_files import recipe_digest
from trainer.model.configs import ConfigRules
from trainer.model.flux.scheduler import SCHEDULER_RULES, check_terminal
from trainer.model.flux.tokens import PATCH, latent_shapes, resolution_shift
from trainer.model.pretrained import quiet_libraries
from trainer.model.single_file import Layout
from trainer.model.weights import on_meta_device
from trainer.objective import Flow
from trainer.objective.flow import shift_time

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch
    from trainer.model.mmdit.encoder import SD3Encoder

TIMESTEPS = 1000
"""The time of pure noise, for the transformer."""


@dataclass(slots=True)
class SD3(Family):
    transformer: str | None = added(None, path=True)
    """Replaces the checkpoint's transformer: a safetensors file, a diffusers folder or a hub id."""
    t5: bool = True
    """Whether T5 reads the prompt. If not, zeros take the place of its states, as in pipelines without
    `text_encoder_3`."""
    text_length: int = 256
    """T5 tokens per prompt. T5 sees no padding mask here, so training and sampling must use the same number."""
    objective: Flow = field(default_factory=Flow)

    classifier_free_guidance = True
    alpha_tensors = False
    # As in diffusers' train_dreambooth_lora_sd3. In the last block `add_q_proj` stays as it is: its output is unused.
    target_modules = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    unquantized_modules = ("pos_embed", "context_embedder", "time_text_embed", "norm_out", "proj_out")

    def __post_init__(self) -> None:
        Family.__post_init__(self)
        if not 1 <= self.text_length <= 512:
            raise UsageError(
                f"model.text_length={self.text_length} is out of range: the pipeline takes 1 to 512 tokens; type "
                "model.text_length=256"
            )

    @property
    def components(self) -> tuple[str, ...]:
        t5 = ("text_encoder_3", "tokenizer_3") if self.t5 else ()
        clips = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        return ("vae", *clips, *t5, "transformer", "scheduler")

    @property
    def size_multiple(self) -> int:
        return PATCH * self._vae_scale_factor()

    def recipes(self, digests: dict[str, str], controls: int) -> dict[str, Recipe]:
        def digest(*names: str) -> str:
            return recipe_digest(
                [digests[name] for name in names], [self.encoder_dtype_of(name).value for name in names]
            )

        clips = Recipe(
            ("caption",),
            recipe_digest(digest("text_encoder", "text_encoder_2"), digests["tokenizer"], digests["tokenizer_2"]),
        )
        recipes = {"latents": Recipe(("image",), digest("vae")), "clip_prompt": clips, "pooled": clips}
        if self.t5:
            t5 = recipe_digest(digest("text_encoder_3"), digests["tokenizer_3"], self.text_length)
            recipes["prompt"] = Recipe(("caption",), t5)
        return recipes

    def shapes(
        self, height: int, width: int, control_sizes: Sequence[tuple[int, int]] = ()
    ) -> dict[str, tuple[int, ...]]:
        transformer = self.component_config("transformer")
        self._check_size(height // self.size_multiple, width // self.size_multiple, transformer["pos_embed_max_size"])
        clips = [self.component_config(f"text_encoder{suffix}") for suffix in ("", "_2")]
        t5 = {"prompt": (self.text_length, transformer["joint_attention_dim"])} if self.t5 else {}
        return {
            **latent_shapes(transformer["in_channels"], self._vae_scale_factor(), (height, width), control_sizes),
            **t5,
            "clip_prompt": (clips[0]["max_position_embeddings"], sum(clip["hidden_size"] for clip in clips)),
            "pooled": (transformer["pooled_projection_dim"],),
        }

    def count_caption_tokens(self, captions: Sequence[str]) -> dict[str, tuple[list[int], int]]:
        from transformers import CLIPTokenizer, T5Tokenizer

        from trainer.model.encoders import count_tokens

        # Both CLIP tokenizers have the same vocabulary.
        clip = CLIPTokenizer.from_pretrained(self.component_folder("tokenizer"))
        counts = {"tokenizer": (count_tokens(clip, captions), clip.model_max_length)}
        if self.t5:
            t5 = T5Tokenizer.from_pretrained(self.component_folder("tokenizer_3"))
            counts["tokenizer_3"] = (count_tokens(t5, captions), self.text_length)
        return counts

    def build_encoder(self, device: torch.device) -> SD3Encoder:
        from trainer.model.mmdit.encoder import SD3Encoder

        quiet_libraries()
        return SD3Encoder(self, device)

    def meta_model(self) -> torch.nn.Module:
        import torch
        from diffusers import SD3Transformer2DModel

        # `on_meta_device` alone would first compute the table of positions, which takes seconds and gigabytes.
        with on_meta_device(), torch.device("meta"):
            network: Any = SD3Transformer2DModel.from_config(self.component_config("transformer"))
        # Allows compiling. diffusers sets it for its other transformers.
        network._repeated_blocks = ["JointTransformerBlock"]
        return network

    def original_layout(self, component: str) -> Layout:
        from trainer.model.mmdit.original import transformer_layout

        return partial(transformer_layout, blocks=self.component_config("transformer")["num_layers"])

    def check_configs(self) -> None:
        Family.check_configs(self)
        check_terminal(self.objective, self.component_config("scheduler").get("shift_terminal"))
        if self.t5 and not self.component_folder("text_encoder_3").is_dir():
            raise UsageError(
                f"model.path={self.path} has no T5 encoder (text_encoder_3); type model.t5=false to train without it, "
                "as the pipeline of this checkpoint generates images"
            )

    def config_rules(self) -> dict[str, ConfigRules]:
        channels = (self.component_config("vae").get("latent_channels", 4),)
        clips = ConfigRules("CLIPTextModelWithProjection", model_type="clip_text_model")
        return {
            "vae": ConfigRules(
                "AutoencoderKL",
                {"in_channels": (3,), "out_channels": (3,), "latents_mean": (None,), "latents_std": (None,)},
            ),
            "text_encoder": clips,
            "text_encoder_2": clips,
            "text_encoder_3": ConfigRules("T5EncoderModel", model_type="t5"),
            "transformer": ConfigRules(
                "SD3Transformer2DModel", {"patch_size": (PATCH,), "in_channels": channels, "out_channels": channels}
            ),
            "scheduler": replace(SCHEDULER_RULES, only={**SCHEDULER_RULES.only, "num_train_timesteps": (TIMESTEPS,)}),
        }

    def time_shift(self, height: int, width: int, steps: int | None = None) -> float:
        return resolution_shift(self.component_config("scheduler"), height, width)

    def sampling_times(self, steps: int, height: int, width: int) -> list[float]:
        """The pipeline passes no `sigmas`. If the shift is static, it is already part of the smallest sigma."""
        shift, smallest = self.time_shift(height, width, steps), 1 / TIMESTEPS
        if not self.component_config("scheduler").get("use_dynamic_shifting", False):
            smallest = shift_time(smallest, shift)
        return self.objective.sampling_times(steps, shift, smallest)

    def predict(
        self, network: Any, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        import torch

        height, width = (side // PATCH for side in latents.shape[-2:])
        self._check_size(height, width, network.config.pos_embed_max_size)
        clip = conditions["clip_prompt"].to(latents.dtype)
        text_width = network.config.joint_attention_dim
        t5 = conditions["prompt"].to(clip) if self.t5 else clip.new_zeros(len(clip), self.text_length, text_width)
        padded = torch.nn.functional.pad(clip, (0, text_width - clip.shape[-1]))
        return network(
            hidden_states=latents,
            timestep=t * TIMESTEPS,
            encoder_hidden_states=torch.cat([padded, t5], 1),
            pooled_projections=conditions["pooled"].to(latents.dtype),
            return_dict=False,
        )[0]

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline

    def comfyui_key(self, key: str) -> str:
        # ComfyUI knows the layers by diffusers' names (mmdit_to_diffusers).
        return f"transformer.{key}"

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        from trainer.model.mmdit import tiny

        tiny.save_tiny_checkpoint(folder)
        return [
            "model.suggested.precision=fp32",
            f"model.path={folder}",
            f"model.text_length={tiny.T5_LENGTH}",
            "dataset.resolution=32",
        ]

    def _vae_scale_factor(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.component_config("vae")["block_out_channels"]) - 1)

    def _check_size(self, height: int, width: int, longest: int) -> None:
        """Raises errors.UsageError if an image has more tokens along a side than the transformer has positions."""
        if max(height, width) > longest:
            pixels = self.size_multiple
            raise UsageError(
                f"An image of {width * pixels}x{height * pixels} px is too large: this model has positions for sides "
                f"of up to {longest * pixels} px; type a smaller dataset.resolution"
            )
