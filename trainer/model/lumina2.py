"""Lumina Image 2.0 (Qin et al. 2025): a flow transformer whose sequence holds image and text; Gemma 2 reads the text.

Follows diffusers' Lumina2Pipeline: the same tensors reach the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.core.errors import UsageError
from trainer.model import Family
from trainer.model.configs import ConfigRules
from trainer.model.flux.scheduler import SCHEDULER_RULES, check_terminal
from trainer.model.flux.tokens import PATCH
from trainer.model.lumina.prompt import prompt_text
from trainer.model.pretrained import quiet_libraries
from trainer.model.single_file import Layout
from trainer.model.single_stream.family import SingleStreamFamily
from trainer.model.weights import on_meta_device

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch
    from trainer.model.lumina.encoder import Lumina2Encoder


@dataclass(slots=True)
class Lumina2(SingleStreamFamily):
    text_length: int = 256
    cfg_normalization: bool = True
    """Whether guided predictions have the norm of those with the caption, in each row of the latents."""
    cfg_truncation: float = 1.0
    """Share of the sampling steps that are guided; the first ones are."""

    unquantized_modules = ("x_embedder", "time_caption_embed", "norm_out")
    unsupported_formats: ClassVar[Mapping[str, str]] = {
        "comfyui": "ComfyUI has the layers of queries, keys and values of Lumina Image 2.0 joined in one"
    }
    unused_file_keys = ("norm_final.",)

    def __post_init__(self) -> None:
        SingleStreamFamily.__post_init__(self)
        if not 0 <= self.cfg_truncation <= 1:
            raise UsageError(
                f"model.cfg_truncation={self.cfg_truncation:g} is out of range; type a share of the steps from 0 to 1, "
                "where 1 guides all steps"
            )

    def count_caption_tokens(self, captions: Sequence[str]) -> dict[str, tuple[list[int], int]]:
        from transformers import GemmaTokenizer

        from trainer.model.encoders import count_tokens

        tokenizer = GemmaTokenizer.from_pretrained(self.component_folder("tokenizer"))
        return {"tokenizer": (count_tokens(tokenizer, [*map(prompt_text, captions)]), self.text_length)}

    def build_encoder(self, device: torch.device) -> Lumina2Encoder:
        from trainer.model.lumina.encoder import Lumina2Encoder

        quiet_libraries()
        return Lumina2Encoder(self, device)

    def meta_model(self) -> torch.nn.Module:
        from diffusers import Lumina2Transformer2DModel

        with on_meta_device():
            return Lumina2Transformer2DModel.from_config(self.component_config("transformer"))

    def original_layout(self, component: str) -> Layout:
        from trainer.model.lumina.original import transformer_layout

        return transformer_layout

    def check_configs(self) -> None:
        Family.check_configs(self)
        check_terminal(self.objective, self.component_config("scheduler").get("shift_terminal"))
        # The position after the text belongs to the image.
        longest = self.component_config("transformer")["axes_lens"][0] - 1
        if self.text_length > longest:
            raise UsageError(
                f"model.text_length={self.text_length} is too long: the transformer has positions for {longest} "
                f"tokens; type model.text_length={longest} or less"
            )

    def config_rules(self) -> dict[str, ConfigRules]:
        channels = self.component_config("vae").get("latent_channels", 4)
        transformer = {"patch_size": (PATCH,), "in_channels": (channels,), "out_channels": (None, channels)}
        vae = {"in_channels": (3,), "out_channels": (3,), "latents_mean": (None,), "latents_std": (None,)}
        # The pipeline takes the number of channels for that of tokens in a dynamic shift.
        scheduler = {**SCHEDULER_RULES.only, "use_dynamic_shifting": (False,)}
        return {
            "vae": ConfigRules("AutoencoderKL", vae),
            "text_encoder": ConfigRules("Gemma2Model", model_type="gemma2"),
            "transformer": ConfigRules("Lumina2Transformer2DModel", transformer),
            "scheduler": ConfigRules(SCHEDULER_RULES.class_name, scheduler),
        }

    def time_shift(self, height: int, width: int, steps: int | None = None) -> float:
        return self.component_config("scheduler").get("shift", 1.0)

    def predict(
        self, network: Any, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        # The transformer's time is 0 for noise and 1 for clean images, and it predicts the clean latents minus the
        # noise.
        return -network(
            hidden_states=latents,
            timestep=1 - t,
            encoder_hidden_states=conditions["prompt"].to(latents.dtype),
            encoder_attention_mask=conditions["prompt_mask"].bool(),
            return_dict=False,
        )[0]

    def apply_guidance(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float, t: torch.Tensor
    ) -> torch.Tensor:
        import torch

        guided = unconditional + guidance * (conditional - unconditional)
        if self.cfg_normalization:
            guided = guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        # Undoes the shift: the share of the steps before this one. The pipeline compares that after it, which is the
        # same if a whole number of steps is guided.
        shift = self.time_shift(*conditional.shape[-2:])
        done = 1 - t / (shift - (shift - 1) * t)
        # `t` is rounded.
        truncated = done > self.cfg_truncation - 1e-4
        return torch.where(truncated.view(-1, 1, 1, 1), conditional, guided)

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import Lumina2Pipeline

        return Lumina2Pipeline

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        from trainer.model.lumina import tiny

        tiny.save_tiny_checkpoint(folder)
        return [
            "model.suggested.precision=fp32",
            f"model.path={folder}",
            f"model.text_length={tiny.TEXT_LENGTH}",
            "dataset.resolution=32",
        ]
