"""Z-Image (Tongyi-MAI 2025): a flow transformer whose sequence holds image and text; Qwen3 reads the text.

Follows diffusers' ZImagePipeline: the same tensors reach the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core.errors import UsageError
from trainer.model import Family
from trainer.model.checkpoint_files import CHAT_TEMPLATE, SUFFIXES
from trainer.model.configs import ConfigRules
from trainer.model.flux.scheduler import SCHEDULER_RULES, check_terminal
from trainer.model.flux.tokens import PATCH, resolution_shift
from trainer.model.pretrained import quiet_libraries
from trainer.model.single_file import Layout
from trainer.model.single_stream.family import SingleStreamFamily
from trainer.model.weights import on_meta_device

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch
    from trainer.model.zimage.encoder import ZImageEncoder

TEXT_MULTIPLE = 32
"""The transformer fills up texts with a learnt token to a multiple of this many tokens."""


@dataclass(slots=True)
class ZImage(SingleStreamFamily):
    """Z-Image and its distilled variant Z-Image-Turbo."""

    cfg_normalization: float = 0.0
    """Largest norm of a guided prediction, relative to that of the prediction with the caption; 0 for no limit."""
    cfg_truncation: float = 1.0
    """There is no guidance at times t with 1 - t above this; 1 guides all steps."""

    suffixes = (*SUFFIXES, CHAT_TEMPLATE)
    unquantized_modules = ("all_x_embedder", "t_embedder", "cap_embedder", "all_final_layer")

    def __post_init__(self) -> None:
        SingleStreamFamily.__post_init__(self)
        if self.cfg_normalization < 0:
            raise UsageError(
                f"model.cfg_normalization={self.cfg_normalization:g} cannot be negative; type 1 for guided predictions "
                "that are no larger than those with the caption, or 0 for no limit"
            )
        if not 0 <= self.cfg_truncation <= 1:
            raise UsageError(
                f"model.cfg_truncation={self.cfg_truncation:g} is out of range; type a number from 0 to 1, where 1 "
                "guides all steps"
            )

    def count_caption_tokens(self, captions: Sequence[str]) -> dict[str, tuple[list[int], int]]:
        from transformers import Qwen2Tokenizer

        from trainer.model.encoders import count_tokens
        from trainer.model.qwen.chat import chat_text

        tokenizer = Qwen2Tokenizer.from_pretrained(self.component_folder("tokenizer"))
        texts = [chat_text(tokenizer, caption, thinking=True) for caption in captions]
        return {"tokenizer": (count_tokens(tokenizer, texts), self.text_length)}

    def build_encoder(self, device: torch.device) -> ZImageEncoder:
        from trainer.model.zimage.encoder import ZImageEncoder

        quiet_libraries()
        return ZImageEncoder(self, device)

    def meta_model(self) -> torch.nn.Module:
        from diffusers import ZImageTransformer2DModel

        with on_meta_device():
            return ZImageTransformer2DModel.from_config(self.component_config("transformer"))

    def original_layout(self, component: str) -> Layout:
        from trainer.model.zimage.original import transformer_layout

        return transformer_layout

    def check_configs(self) -> None:
        Family.check_configs(self)
        check_terminal(self.objective, self.component_config("scheduler").get("shift_terminal"))
        # The first position belongs to padding, and that after the text to the image.
        positions = self.component_config("transformer")["axes_lens"][0] - 2
        longest = positions // TEXT_MULTIPLE * TEXT_MULTIPLE
        if self.text_length > longest:
            raise UsageError(
                f"model.text_length={self.text_length} is too long: the transformer has positions for {longest} "
                f"tokens; type model.text_length={longest} or less"
            )

    def config_rules(self) -> dict[str, ConfigRules]:
        channels = self.component_config("vae").get("latent_channels", 4)
        transformer = {
            "all_patch_size": ([PATCH], (PATCH,)),
            "all_f_patch_size": ([1], (1,)),
            "in_channels": (channels,),
            "siglip_feat_dim": (None,),
        }
        vae = {"in_channels": (3,), "out_channels": (3,), "latents_mean": (None,), "latents_std": (None,)}
        return {
            "vae": ConfigRules("AutoencoderKL", vae),
            "text_encoder": ConfigRules("Qwen3Model", model_type="qwen3"),
            "transformer": ConfigRules("ZImageTransformer2DModel", transformer),
            "scheduler": SCHEDULER_RULES,
        }

    def time_shift(self, height: int, width: int, steps: int | None = None) -> float:
        return resolution_shift(self.component_config("scheduler"), height, width)

    def predict(
        self, network: Any, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        import torch

        from trainer.model.zimage.prompts import cut_padding

        # The transformer reads lists of images (C, frames, h, w) and of texts. Its time is 0 for noise and 1 for clean
        # images, and it predicts the clean latents minus the noise.
        output = network(
            list(latents.unsqueeze(2)),
            1 - t,
            cut_padding(conditions["prompt"].to(latents.dtype), conditions["prompt_mask"]),
            return_dict=False,
        )[0]
        return -torch.stack(output).squeeze(2)

    def apply_guidance(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float, t: torch.Tensor
    ) -> torch.Tensor:
        """Returns c + guidance (c - u), as in the pipeline; other models call this a guidance of 1 more."""
        import torch

        guided = conditional + guidance * (conditional - unconditional)
        if self.cfg_normalization:
            norm, guided_norm = (x.flatten(1).norm(dim=1) for x in (conditional, guided))
            factor = (self.cfg_normalization * norm / guided_norm).clamp(max=1)
            guided = guided * factor.view(-1, 1, 1, 1)
        truncated = 1 - t > self.cfg_truncation
        return torch.where(truncated.view(-1, 1, 1, 1), conditional, guided)

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import ZImagePipeline

        return ZImagePipeline

    def comfyui_key(self, key: str) -> str:
        # ComfyUI also knows Z-Image's layers by diffusers' names (z_image_to_diffusers in comfy/utils.py), and finds q,
        # k and v in its joined layer. With the prefix `transformer.`, diffusers finds no layer if there is an alpha.
        return f"diffusion_model.{key}"

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        from trainer.model.zimage import tiny

        tiny.save_tiny_checkpoint(folder)
        return [
            "model.suggested.precision=fp32",
            f"model.path={folder}",
            f"model.text_length={tiny.TEXT_LENGTH}",
            "dataset.resolution=32",
        ]
