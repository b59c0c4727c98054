"""FLUX.1 Kontext (Black Forest Labs 2025): a flow transformer that reads the control picture as further tokens.

Follows diffusers' FluxKontextPipeline: the tensors that reach the transformer are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core import files
from trainer.core.errors import UsageError
from trainer.model import (
    Family,
    Recipe,
    control_names,
    empty_model,
    on_meta_device,
    quiet_libraries,
    recipe_digest,
    text_model,
)
from trainer.objective import Flow

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trainer.dataset.view import TransformedSample

PATCH = 2
"""Latent pixels a token side."""


@dataclass(slots=True)
class FluxKontext(Family):
    text_length: int = 512
    """T5 tokens a prompt. T5 sees no padding mask here, so training and sampling must use the same number."""
    guidance: float = 1.0
    """Guidance embedding in training, where the transformer was distilled with one."""
    objective: Flow = field(default_factory=Flow)

    controls = range(10)
    components = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    # Of the whole network: `proj_out` is also the name of a layer in each single block.
    keep_high = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")

    @property
    def multiple(self) -> int:
        return PATCH * self._scale()

    def __post_init__(self) -> None:
        Family.__post_init__(self)
        if self.text_length < 1:
            raise UsageError(f"model.text_length={self.text_length} leaves no token for the prompt; type 512 for FLUX")

    def parts(self, components: dict[str, str], controls: int) -> dict[str, Recipe]:
        dtype = self.encoder_dtype.value
        picture = recipe_digest(components["vae"], dtype)
        parts = {
            "latents": Recipe(("image",), picture),
            "prompt": Recipe(
                ("caption",),
                recipe_digest(components["text_encoder_2"], components["tokenizer_2"], self.text_length, dtype),
            ),
            "pooled": Recipe(("caption",), recipe_digest(components["text_encoder"], components["tokenizer"], dtype)),
        }
        return parts | {name: Recipe((name,), picture) for name in control_names(controls)}

    def spec(self, height: int, width: int, controls: Sequence[tuple[int, int]] = ()) -> dict[str, tuple[int, ...]]:
        scale, transformer = self._scale(), self.config("transformer")

        def latents(height: int, width: int) -> tuple[int, ...]:
            return transformer["in_channels"] // PATCH**2, height // scale, width // scale

        spec = {
            "latents": latents(height, width),
            "prompt": (self.text_length, transformer["joint_attention_dim"]),
            "pooled": (transformer["pooled_projection_dim"],),
        }
        return spec | {name: latents(*size) for name, size in zip(control_names(len(controls)), controls, strict=True)}

    def caption_tokens(self, captions: Sequence[str]) -> tuple[list[int], int]:
        from transformers import T5Tokenizer

        tokenizer = T5Tokenizer.from_pretrained(self.folder() / "tokenizer_2")
        return [len(tokenizer(caption, verbose=False).input_ids) for caption in captions], self.text_length

    def encoder(self, device: torch.device) -> FluxEncoder:
        quiet_libraries()
        return FluxEncoder(self.folder(), device, self.encoder_dtype.value, self.text_length)

    def meta_model(self) -> torch.nn.Module:
        from diffusers import FluxTransformer2DModel

        with on_meta_device():
            return FluxTransformer2DModel.from_config(self.config("transformer"))

    def predict(
        self, network, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor], guidance: float | None = None
    ) -> torch.Tensor:
        import torch

        tokens, ids = pack(x), position_ids(x, 0)
        target_length = tokens.shape[1]
        for picture, name in enumerate((name for name in control_names(len(cond)) if name in cond), 1):
            # Autocast to float16 joins no bfloat16, in which latents may be cached.
            control = cond[name].to(x.dtype)
            tokens = torch.cat([tokens, pack(control)], 1)
            ids = torch.cat([ids, position_ids(control, picture)])
        scale = None
        if network.config.guidance_embeds:
            scale = x.new_full((len(x),), self.guidance if guidance is None else guidance, dtype=torch.float32)
        prompt = cond["prompt"].to(tokens.dtype)
        out = network(
            hidden_states=tokens,
            encoder_hidden_states=prompt,
            pooled_projections=cond["pooled"].to(tokens.dtype),
            timestep=t,
            img_ids=ids,
            txt_ids=ids.new_zeros(prompt.shape[1], 3),
            guidance=scale,
            return_dict=False,
        )[0]
        return unpack(out[:, :target_length], *x.shape[2:])

    def export_name(self, key: str) -> str:
        # ComfyUI knows FLUX's layers by diffusers' names and reads alpha from a tensor beside them, for it asks no metadata; so does
        # diffusers. kohya's `lora_unet_double_blocks_0_img_attn_qkv` would join q, k and v (in single blocks the MLP too) into one layer of
        # three or four times the rank, mostly zeros, which diffusers takes apart for the published sizes only.
        return f"transformer.{key}"

    def save_adapter(self, weights: dict[str, torch.Tensor], adapter: dict, path: Path) -> None:
        from diffusers import FluxKontextPipeline

        # Without the metadata a loader takes alpha for the rank; with the dropout in it a pipeline would draw with dropout.
        metadata = adapter | {"lora_dropout": 0.0, "inference_mode": True}
        with files.from_safetensors(path):
            FluxKontextPipeline.save_lora_weights(
                path.parent,
                transformer_lora_layers=weights,
                weight_name=path.name,
                transformer_lora_adapter_metadata=metadata,
            )

    def load_adapter(self, path: Path) -> torch.nn.Module:
        from diffusers import FluxKontextPipeline

        quiet_libraries()
        network = empty_model(self.meta_model())
        weights, alphas, metadata = FluxKontextPipeline.lora_state_dict(
            path.parent,
            weight_name=path.name,
            return_alphas=True,
            return_lora_metadata=True,
            local_files_only=True,
            use_safetensors=True,
        )
        FluxKontextPipeline.load_lora_into_transformer(
            weights, network_alphas=alphas, transformer=network, metadata=metadata, low_cpu_mem_usage=True
        )
        return network

    @classmethod
    def tiny(cls, folder: Path) -> list[str]:
        import torch
        from diffusers import AutoencoderKL, FluxTransformer2DModel

        from trainer.model.mini_kontext.build import SEED, save_folder

        torch.manual_seed(SEED)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=1,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.36,
            shift_factor=0.11,
        )
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        words = ("make", "it", "night", "paint", "the", "a", "photo", "of")
        save_folder(folder, vae, transformer, words, text_length=8, text_width=16)
        return [f"model.path={folder}", "model.text_length=8", "dataset.resolution=32"]

    def shift(self, height: int, width: int) -> float:
        return resolution_shift(self.config("scheduler"), height, width)

    def _scale(self) -> int:
        """Pixels a latent pixel."""
        return 2 ** (len(self.config("vae")["block_out_channels"]) - 1)


def resolution_shift(scheduler: dict, height: int, width: int) -> float:
    """exp(mu), mu linear in the number of tokens of a latent size, by a scheduler's config (diffusers' `calculate_shift`)."""
    scheduler = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15} | scheduler
    low, high = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
    slope = (scheduler["max_shift"] - scheduler["base_shift"]) / (high - low)
    return math.exp(scheduler["base_shift"] + slope * (height * width / PATCH**2 - low))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> tokens (B, h/2 * w/2, 4 C)."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens (B, h/2 * w/2, 4 C) -> (B, C, h, w)."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def position_ids(latents: torch.Tensor, picture: int) -> torch.Tensor:
    """(tokens, 3): which picture (0 the target, 1, 2 ... the controls, as in section 3 of the paper), row, column. A wrong first column raises
    nothing."""
    import torch

    height, width = (side // PATCH for side in latents.shape[2:])
    rows, columns = torch.arange(height, device=latents.device), torch.arange(width, device=latents.device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2).to(latents.dtype)
    return torch.cat([grid.new_full((len(grid), 1), picture), grid], 1)


class FluxEncoder:
    """VAE, CLIP and T5 of one checkpoint folder; see `trainer.model.Encoder`."""

    def __init__(self, folder: Path, device: torch.device, dtype: str, text_length: int):
        import torch

        self.folder, self.device, self.text_length = folder, device, text_length
        self.dtype = getattr(torch, dtype)

    def encode(self, part: str, view: TransformedSample) -> torch.Tensor:
        import torch

        with torch.no_grad():
            if part in ("prompt", "pooled"):
                return {"prompt": self._prompt, "pooled": self._pooled}[part](view.caption).cpu()
            return self._latents(view.picture("image" if part == "latents" else part)).cpu()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        import torch

        config = self._vae.config
        with torch.no_grad():
            images = self._vae.decode(
                latents.to(self.device, self.dtype) / config.scaling_factor + config.shift_factor
            ).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def _latents(self, picture: np.ndarray) -> torch.Tensor:
        import torch

        pixels = torch.from_numpy(picture).to(self.device).permute(2, 0, 1)[None].to(self.dtype) / 127.5 - 1
        config = self._vae.config
        return (self._vae.encode(pixels).latent_dist.mode()[0] - config.shift_factor) * config.scaling_factor

    def _prompt(self, caption: str) -> torch.Tensor:
        tokenizer, model = self._t5
        ids = tokenizer(
            caption, padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt"
        ).input_ids
        return model(ids.to(self.device)).last_hidden_state[0]

    def _pooled(self, caption: str) -> torch.Tensor:
        tokenizer, model = self._clip
        ids = tokenizer(
            caption, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return model(ids.to(self.device)).pooler_output[0]

    @cached_property
    def _vae(self):
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(
            self.folder, subfolder="vae", torch_dtype=self.dtype, use_safetensors=True
        ).to(self.device)

    @cached_property
    def _clip(self):
        from transformers import CLIPTextModel, CLIPTokenizer

        model = text_model(CLIPTextModel, self.folder / "text_encoder", self.dtype, self.device)
        return CLIPTokenizer.from_pretrained(self.folder / "tokenizer"), model

    @cached_property
    def _t5(self):
        from transformers import T5EncoderModel, T5Tokenizer

        model = text_model(T5EncoderModel, self.folder / "text_encoder_2", self.dtype, self.device)
        return T5Tokenizer.from_pretrained(self.folder / "tokenizer_2"), model
