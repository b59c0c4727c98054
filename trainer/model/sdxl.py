"""SDXL (Podell et al. 2023): a UNet that reads the penultimate hidden states of two CLIP text encoders.

It also reads the pooled output of the second encoder and the sizes of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.core import documents
from trainer.model import Recipe
from trainer.model.checkpoint_files import recipe_digest
from trainer.model.single_file import Layout
from trainer.model.unet.family import UNetFamily

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch


@dataclass(slots=True)
class SDXL(UNetFamily):
    default_config = "stabilityai/stable-diffusion-xl-base-1.0"
    file_prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **UNetFamily.file_prefixes,
        "text_encoder": ("conditioner.embedders.0.transformer.",),
        "text_encoder_2": ("conditioner.embedders.1.model.",),
    }
    text_suffixes = ("", "_2")
    caption_tensors = ("prompt", "pooled")
    addition_embed_type = "text_time"
    ignores_clipping = False
    index_keys: ClassVar[Mapping[str, str]] = {
        **UNetFamily.index_keys,
        "force_zeros_for_empty_prompt": "followed",
    }

    @classmethod
    def text_encoder_class(cls, suffix: str) -> Any:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        return CLIPTextModelWithProjection if suffix else CLIPTextModel

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline

    def original_layout(self, component: str) -> Layout:
        from trainer.model.unet.original import open_clip_layout

        return open_clip_layout if component == "text_encoder_2" else UNetFamily.original_layout(self, component)

    def readable_layouts(self, component: str) -> tuple[Layout, ...]:
        from trainer.model.unet.original import untransposed_open_clip_layout

        layouts = UNetFamily.readable_layouts(self, component)
        return (*layouts, untransposed_open_clip_layout) if component == "text_encoder_2" else layouts

    def recipes(self, digests: dict[str, str], controls: int) -> dict[str, Recipe]:
        sizes = Recipe(("geometry",), recipe_digest("sizes"))
        return UNetFamily.recipes(self, digests, controls) | {"time_ids": sizes}

    def shapes(
        self, height: int, width: int, control_sizes: Sequence[tuple[int, int]] = ()
    ) -> dict[str, tuple[int, ...]]:
        return UNetFamily.shapes(self, height, width, control_sizes) | {"time_ids": (6,)}

    def encode_tokens(self, encoders: Sequence[Any], token_ids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, token_ids, strict=True)]
        prompt = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        pooled = outputs[1].text_embeds
        if self._zeros_for_empty_caption():
            empty = self.tokenize("tokens", "").to(token_ids[0].device)
            has_caption = (token_ids[0] != empty).any(1)
            prompt, pooled = prompt * has_caption[:, None, None], pooled * has_caption[:, None]
        return {"prompt": prompt, "pooled": pooled}

    def added_conditions(
        self, conditions: Batch, latents: torch.Tensor, guidance: float | None
    ) -> dict[str, torch.Tensor]:
        # (original height, original width, crop top, crop left, height, width)
        sizes = conditions["time_ids"]
        if guidance is not None:
            # Sampling asks for an uncropped image of the target size, as pipelines do, however the sample was cropped.
            sizes = sizes[:, [4, 5, 4, 5, 4, 5]] * sizes.new_tensor([1, 1, 0, 0, 1, 1])
        return {"text_embeds": conditions["pooled"].to(latents.dtype), "time_ids": sizes}

    def _caption_digest(self, name: str, digests: dict[str, str]) -> str:
        if name == "pooled":
            dtype = self._dtype_key("text_encoder_2")
            digest = recipe_digest(digests["text_encoder_2"], digests["tokenizer_2"], dtype)
        else:
            digest = UNetFamily._caption_digest(self, name, digests)
        return recipe_digest(digest, self._zeros_for_empty_caption())

    def _caption_shapes(self) -> dict[str, tuple[int, ...]]:
        pooled = (self.component_config("text_encoder_2")["projection_dim"],)
        return UNetFamily._caption_shapes(self) | {"pooled": pooled}

    def _zeros_for_empty_caption(self) -> bool:
        """Returns whether the checkpoint was trained with zeros in place of the encoded empty caption."""
        path = self.folder() / "model_index.json"
        index = documents.read_json(path) if path.exists() else {}
        return index.get("force_zeros_for_empty_prompt", True)

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        from trainer.model.unet.tiny import save_tiny_checkpoint

        return save_tiny_checkpoint(folder, cls)
