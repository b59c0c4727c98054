"""The base class of families with FLUX's transformer: a flow transformer that reads tokens of T5 and of images.

Follows diffusers' FluxPipeline and, with control images, FluxKontextPipeline: the same tensors reach the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core.errors import UsageError
from trainer.core.settings import added
from trainer.dataset.sample import control_names
from trainer.model import Family, Recipe
from trainer.model.checkpoint_files import recipe_digest
from trainer.model.configs import ConfigRules
from trainer.model.flux.scheduler import SCHEDULER_RULES, check_terminal
from trainer.model.flux.tokens import (
    PATCH,
    control_latents,
    latent_shapes,
    pack,
    position_ids,
    resolution_shift,
    unpack,
)
from trainer.model.pretrained import quiet_libraries
from trainer.model.single_file import Layout
from trainer.model.weights import on_meta_device
from trainer.objective import Flow

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch
    from trainer.model.flux.encoder import FluxEncoder


@dataclass(slots=True)
class FluxFamily(Family):
    """Base class of FLUX.1 [dev] and FLUX.1 Kontext."""

    transformer: str | None = added(None, path=True)
    """Replaces the checkpoint's transformer: a safetensors file, a diffusers folder or a hub id."""
    text_length: int = 512
    """T5 tokens per prompt. T5 sees no padding mask here, so training and sampling must use the same number."""
    guidance: float = 1.0
    """Guidance embedding in training, for transformers that were distilled with one."""
    objective: Flow = field(default_factory=Flow)

    components = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    target_modules = ("to_q", "to_k", "to_v", "to_out.0")
    # `proj_out` is the last layer. The layers of this name in the single blocks may be quantized.
    unquantized_modules = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")

    def __post_init__(self) -> None:
        Family.__post_init__(self)
        if self.text_length < 1:
            raise UsageError(f"model.text_length={self.text_length} leaves no token for the prompt; type 512 for FLUX")

    @property
    def size_multiple(self) -> int:
        return PATCH * self._vae_scale_factor()

    def recipes(self, digests: dict[str, str], controls: int) -> dict[str, Recipe]:
        dtypes = {name: self.encoder_dtype_of(name).value for name in ("vae", "text_encoder", "text_encoder_2")}
        vae = recipe_digest(digests["vae"], dtypes["vae"])
        prompt = recipe_digest(
            digests["text_encoder_2"], digests["tokenizer_2"], self.text_length, dtypes["text_encoder_2"]
        )
        pooled = recipe_digest(digests["text_encoder"], digests["tokenizer"], dtypes["text_encoder"])
        return {
            "latents": Recipe(("image",), vae),
            "prompt": Recipe(("caption",), prompt),
            "pooled": Recipe(("caption",), pooled),
            **{name: Recipe((name,), vae) for name in control_names(controls)},
        }

    def shapes(
        self, height: int, width: int, control_sizes: Sequence[tuple[int, int]] = ()
    ) -> dict[str, tuple[int, ...]]:
        transformer = self.component_config("transformer")
        channels = transformer["in_channels"] // PATCH**2
        return {
            **latent_shapes(channels, self._vae_scale_factor(), (height, width), control_sizes),
            "prompt": (self.text_length, transformer["joint_attention_dim"]),
            "pooled": (transformer["pooled_projection_dim"],),
        }

    def count_caption_tokens(self, captions: Sequence[str]) -> dict[str, tuple[list[int], int]]:
        from transformers import T5Tokenizer

        from trainer.model.encoders import count_tokens

        tokenizer = T5Tokenizer.from_pretrained(self.component_folder("tokenizer_2"))
        return {"tokenizer_2": (count_tokens(tokenizer, captions), self.text_length)}

    def build_encoder(self, device: torch.device) -> FluxEncoder:
        from trainer.model.flux.encoder import FluxEncoder

        quiet_libraries()
        return FluxEncoder(self, device)

    def meta_model(self) -> torch.nn.Module:
        from diffusers import FluxTransformer2DModel

        with on_meta_device():
            return FluxTransformer2DModel.from_config(self.component_config("transformer"))

    def original_layout(self, component: str) -> Layout:
        from trainer.model.flux.original import transformer_layout

        return transformer_layout

    def other_layer_names(self, name: str) -> tuple[str, ...]:
        from trainer.model.flux.original import xlabs_layer

        return xlabs_layer(name)

    def check_configs(self) -> None:
        Family.check_configs(self)
        check_terminal(self.objective, self.component_config("scheduler").get("shift_terminal"))

    def config_rules(self) -> dict[str, ConfigRules]:
        channels = self.component_config("vae").get("latent_channels", 4) * PATCH**2
        transformer = {"patch_size": (1,), "in_channels": (channels,), "out_channels": (None, channels)}
        return {
            "vae": ConfigRules(
                "AutoencoderKL",
                {"in_channels": (3,), "out_channels": (3,), "latents_mean": (None,), "latents_std": (None,)},
            ),
            "text_encoder": ConfigRules("CLIPTextModel", model_type="clip_text_model"),
            "text_encoder_2": ConfigRules("T5EncoderModel", model_type="t5"),
            "transformer": ConfigRules("FluxTransformer2DModel", transformer),
            "scheduler": SCHEDULER_RULES,
        }

    def time_shift(self, height: int, width: int, steps: int | None = None) -> float:
        return resolution_shift(self.component_config("scheduler"), height, width)

    def predict(
        self, network: Any, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        import torch

        tokens, image_ids = pack(latents), position_ids(latents, 0)
        target_length = tokens.shape[1]
        for number, control in enumerate(control_latents(conditions, latents.dtype), 1):
            tokens = torch.cat([tokens, pack(control)], 1)
            image_ids = torch.cat([image_ids, position_ids(control, number)])
        guidance_embedding = None
        if network.config.guidance_embeds:
            guidance_embedding = latents.new_full(
                (len(latents),), self.guidance if guidance is None else guidance, dtype=torch.float32
            )
        prompt = conditions["prompt"].to(tokens.dtype)
        output = network(
            hidden_states=tokens,
            encoder_hidden_states=prompt,
            pooled_projections=conditions["pooled"].to(tokens.dtype),
            timestep=t,
            img_ids=image_ids,
            txt_ids=image_ids.new_zeros(prompt.shape[1], 3),
            guidance=guidance_embedding,
            return_dict=False,
        )[0]
        return unpack(output[:, :target_length], *latents.shape[2:])

    def comfyui_key(self, key: str) -> str:
        # ComfyUI knows FLUX's layers by diffusers' names. Like diffusers, it reads alpha from a tensor beside them; it
        # reads no metadata. kohya's `lora_unet_double_blocks_0_img_attn_qkv` would join q, k and v (and the MLP in
        # single blocks) into one layer of three or four times the rank, mostly zeros, which diffusers takes apart for
        # the published sizes only.
        return f"transformer.{key}"

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        from trainer.model.flux import layout

        layout.save_tiny_checkpoint(folder, cls.pipeline_class().__name__, text_length=8)
        return [
            "model.suggested.precision=fp32",
            f"model.path={folder}",
            "model.text_length=8",
            "dataset.resolution=32",
        ]

    def _vae_scale_factor(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.component_config("vae")["block_out_channels"]) - 1)
