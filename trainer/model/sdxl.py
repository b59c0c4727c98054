"""SDXL (Podell et al. 2023): a UNet that reads the last but one states of two CLIPs, the second's summary, and the sizes of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core import files
from trainer.model import Recipe, recipe_digest
from trainer.model.unet import UNet

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class SDXL(UNet):
    texts = ("", "_2")
    words = ("prompt", "pooled")

    def parts(self, components: dict[str, str], controls: int) -> dict[str, Recipe]:
        return UNet.parts(self, components, controls) | {"time_ids": Recipe(("geometry",), recipe_digest("sizes"))}

    def spec(self, height: int, width: int, controls: Sequence[tuple[int, int]] = ()) -> dict[str, tuple[int, ...]]:
        return UNet.spec(self, height, width, controls) | {"time_ids": (6,)}

    @classmethod
    def text_class(cls, text: str) -> type:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        return CLIPTextModelWithProjection if text else CLIPTextModel

    @classmethod
    def pipeline(cls) -> type:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline

    def read(self, encoders: Sequence[torch.nn.Module], tokens: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        states = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, tokens, strict=True)]
        prompt, pooled = torch.cat([state.hidden_states[-2] for state in states], -1), states[1].text_embeds
        if self._zeros_for_no_caption():
            said = (tokens[0] != self.tokens("", "").to(tokens[0].device)).any(1)
            prompt, pooled = prompt * said[:, None, None], pooled * said[:, None]
        return {"prompt": prompt, "pooled": pooled}

    def added(self, cond: dict[str, torch.Tensor], x: torch.Tensor, guidance: float | None) -> dict[str, torch.Tensor]:
        sizes = cond["time_ids"]
        if guidance is not None:
            # To be drawn is a whole picture of the size it gets, as pipelines ask for it, whatever the sample was cut from.
            sizes = sizes[:, [4, 5, 4, 5, 4, 5]] * sizes.new_tensor([1, 1, 0, 0, 1, 1])
        return {"text_embeds": cond["pooled"].to(x.dtype), "time_ids": sizes}

    def _word_maker(self, part: str, components: dict[str, str]) -> str:
        if part == "pooled":
            made = recipe_digest(components["text_encoder_2"], components["tokenizer_2"], self.encoder_dtype.value)
        else:
            made = UNet._word_maker(self, part, components)
        return recipe_digest(made, self._zeros_for_no_caption())

    def _word_shapes(self) -> dict[str, tuple[int, ...]]:
        return UNet._word_shapes(self) | {"pooled": (self.config("text_encoder_2")["projection_dim"],)}

    def _zeros_for_no_caption(self) -> bool:
        """Whether the checkpoint was trained with zeros in place of what the text encoders make of an empty caption."""
        index = self.folder() / "model_index.json"
        return (files.read_json(index) if index.exists() else {}).get("force_zeros_for_empty_prompt", True)

    @classmethod
    def tiny(cls, folder: Path) -> list[str]:
        from trainer.model.unet.tiny import save

        save(folder, cls)
        return [f"model.path={folder}", "dataset.resolution=32"]
