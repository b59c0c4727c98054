"""The base class of these families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from trainer.core.errors import UsageError
from trainer.core.settings import added
from trainer.model import Family, Recipe
from trainer.model.checkpoint_files import recipe_digest
from trainer.model.flux.tokens import PATCH, latent_shapes
from trainer.objective import Flow


@dataclass(slots=True)
class SingleStreamFamily(Family):
    """Settings, cached tensors and shapes. A family adds its network, its encoder and its guidance."""

    transformer: str | None = added(None, path=True)
    """Replaces the checkpoint's transformer: a safetensors file, a diffusers folder or a hub id."""
    text_length: int = 512
    """Most tokens of a text, with what surrounds the caption; further ones are cut off."""
    objective: Flow = field(default_factory=Flow)

    classifier_free_guidance = True
    components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    # As in diffusers' train_dreambooth_lora scripts of these models.
    target_modules = ("to_q", "to_k", "to_v", "to_out.0")

    def __post_init__(self) -> None:
        Family.__post_init__(self)
        if self.text_length < 1:
            usual = next(setting.default for setting in fields(self) if setting.name == "text_length")
            raise UsageError(f"model.text_length={self.text_length} leaves no token for the prompt; type {usual}")

    @property
    def size_multiple(self) -> int:
        return PATCH * self._vae_scale_factor()

    def recipes(self, digests: dict[str, str], controls: int) -> dict[str, Recipe]:
        dtypes = {name: self.encoder_dtype_of(name).value for name in ("vae", "text_encoder")}
        language_model = (digests["text_encoder"], digests["tokenizer"], dtypes["text_encoder"])
        prompt = Recipe(("caption",), recipe_digest(*language_model, self.text_length))
        return {
            "latents": Recipe(("image",), recipe_digest(digests["vae"], dtypes["vae"])),
            "prompt": prompt,
            # False where the prompt of a batch is padding.
            "prompt_mask": prompt,
        }

    def shapes(
        self, height: int, width: int, control_sizes: Sequence[tuple[int, int]] = ()
    ) -> dict[str, tuple[int, ...]]:
        transformer = self.component_config("transformer")
        largest = min(transformer["axes_lens"][1:]) * self.size_multiple
        if max(height, width) > largest:
            raise UsageError(
                f"An image of {width}x{height} px is too large: the transformer has positions for up to {largest} px; "
                f"type dataset.resolution={largest} or less"
            )
        return {
            **latent_shapes(transformer["in_channels"], self._vae_scale_factor(), (height, width), control_sizes),
            "prompt": (self.text_length, transformer["cap_feat_dim"]),
            "prompt_mask": (self.text_length,),
        }

    def _vae_scale_factor(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.component_config("vae")["block_out_channels"]) - 1)
