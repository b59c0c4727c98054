"""Qwen-Image-Edit (Qwen 2025): a flow transformer that reads control images as further tokens.

A language model reads the instruction and sees the control images too. Follows diffusers' QwenImageEditPipeline and,
with `numbered`, QwenImageEditPlusPipeline: the same tensors reach the transformer.
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
from trainer.model.flux.tokens import PATCH, control_latents, latent_shapes, pack, resolution_shift, unpack
from trainer.model.pretrained import quiet_libraries
from trainer.model.qwen.template import ANSWER, SYSTEM
from trainer.model.qwen.vision import VISION_MULTIPLE, load_image_processor, vision_size
from trainer.model.weights import on_meta_device
from trainer.objective import Flow

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch
    from trainer.model.qwen.encoder import QwenEncoder


@dataclass(slots=True)
class QwenImageEdit(Family):
    transformer: str | None = added(None, path=True)
    """Replaces the checkpoint's transformer: a safetensors file, a diffusers folder or a hub id."""
    text_length: int = 512
    """Longest instruction in tokens, with the template but without images; longer ones are refused."""
    numbered: bool = False
    """Whether the prompt calls the control images "Picture 1", "Picture 2", ... Plus was trained with that, and
    several control images need it."""
    vision_area: int | None = None
    """Pixels of a control image as the language model sees it, in about its own aspect ratio. Null: the image as the
    VAE sees it."""
    objective: Flow = field(default_factory=Flow)

    classifier_free_guidance = True
    components = ("vae", "text_encoder", "tokenizer", "processor", "transformer", "scheduler")
    # The image stream only: the last block's text output is discarded, so adapters on the text stream's queries,
    # output and MLP would include some that never train.
    target_modules = ("to_q", "to_k", "to_v", "to_out.0")
    unquantized_modules = ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out")

    def __post_init__(self) -> None:
        Family.__post_init__(self)
        if self.text_length < 1:
            raise UsageError(
                f"model.text_length={self.text_length} leaves no token for the prompt; type model.text_length=512"
            )
        if self.vision_area is not None and self.vision_area < VISION_MULTIPLE**2:
            raise UsageError(
                f"model.vision_area={self.vision_area} is too small for an image; type 147456 for 384 x 384 pixels, "
                "or null"
            )

    @property
    def control_counts(self) -> range:
        return range(1, 10 if self.numbered else 2)

    @property
    def size_multiple(self) -> int:
        return PATCH * self._vae_scale_factor()

    def recipes(self, digests: dict[str, str], controls: int) -> dict[str, Recipe]:
        vae = recipe_digest(digests["vae"], self.encoder_dtype_of("vae").value)
        dtype = self.encoder_dtype_of("text_encoder").value
        language_model = [digests[name] for name in ("text_encoder", "tokenizer", "processor")]
        prompt = Recipe(
            ("caption", "controls"),
            recipe_digest(*language_model, SYSTEM, ANSWER, self.numbered, self.vision_area, dtype),
        )
        return {
            "latents": Recipe(("image",), vae),
            "prompt": prompt,
            # False where the prompt of a batch is padding.
            "prompt_mask": prompt,
            **{name: Recipe((name,), vae) for name in control_names(controls)},
        }

    def shapes(
        self, height: int, width: int, control_sizes: Sequence[tuple[int, int]] = ()
    ) -> dict[str, tuple[int, ...]]:
        transformer = self.component_config("transformer")
        channels = transformer["in_channels"] // PATCH**2
        tokens = self.text_length + sum(self._image_tokens(*size) for size in control_sizes)
        return {
            **latent_shapes(channels, self._vae_scale_factor(), (height, width), control_sizes),
            "prompt": (tokens, transformer["joint_attention_dim"]),
            "prompt_mask": (tokens,),
        }

    def _image_tokens(self, height: int, width: int) -> int:
        """Returns the number of tokens of a control image in the prompt."""
        if self.vision_area:
            width, height = vision_size(height, width, self.vision_area)
        processor = load_image_processor(self.component_folder("processor"))
        return processor.get_number_of_image_patches(height, width, {}) // processor.merge_size**2

    def build_encoder(self, device: torch.device) -> QwenEncoder:
        from trainer.model.qwen.encoder import QwenEncoder

        quiet_libraries()
        return QwenEncoder(self, device)

    def meta_model(self) -> torch.nn.Module:
        from diffusers import QwenImageTransformer2DModel

        # diffusers would warn of unused entries in the published config.
        quiet_libraries()
        with on_meta_device():
            return QwenImageTransformer2DModel.from_config(self.component_config("transformer"))

    def check_configs(self) -> None:
        Family.check_configs(self)
        check_terminal(self.objective, self.component_config("scheduler").get("shift_terminal"))

    def config_rules(self) -> dict[str, ConfigRules]:
        channels = self.component_config("vae").get("z_dim", 16)
        transformer = {
            "patch_size": (PATCH,),
            "in_channels": (channels * PATCH**2,),
            "out_channels": (channels,),
            "guidance_embeds": (False,),
            "use_additional_t_cond": (False,),
            "use_layer3d_rope": (False,),
        }
        return {
            "vae": ConfigRules("AutoencoderKLQwenImage", {"input_channels": (3,)}),
            "text_encoder": ConfigRules("Qwen2_5_VLForConditionalGeneration", model_type="qwen2_5_vl"),
            "transformer": ConfigRules(
                "QwenImageTransformer2DModel",
                transformer,
                {"pooled_projection_dim": "the published config has it, and the transformer reads no pooled text"},
            ),
            "scheduler": SCHEDULER_RULES,
        }

    def time_shift(self, height: int, width: int, steps: int | None = None) -> float:
        return resolution_shift(self.component_config("scheduler"), height, width)

    def predict(
        self, network: Any, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        import torch

        images = [latents, *control_latents(conditions, latents.dtype)]
        shapes = [(1, image.shape[2] // PATCH, image.shape[3] // PATCH) for image in images]
        tokens = [pack(image) for image in images]
        output = network(
            hidden_states=torch.cat(tokens, 1),
            encoder_hidden_states=conditions["prompt"].to(latents.dtype),
            # Without the mask, padding would be read as text.
            encoder_hidden_states_mask=conditions["prompt_mask"].bool(),
            timestep=t,
            # Only the first sample's shapes count; all samples of a micro-batch have the same sizes.
            img_shapes=[shapes] * len(latents),
            return_dict=False,
        )[0]
        return unpack(output[:, : tokens[0].shape[1]], *latents.shape[2:])

    def apply_guidance(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float, t: torch.Tensor
    ) -> torch.Tensor:
        """Like `Family.apply_guidance`, but tokens keep the norm they have with the caption, as in the pipeline."""
        with_caption = pack(conditional)
        guided = pack(Family.apply_guidance(self, conditional, unconditional, guidance, t))
        rescaled = guided * (with_caption.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack(rescaled, *conditional.shape[2:])

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import QwenImageEditPipeline

        return QwenImageEditPipeline

    def comfyui_key(self, key: str) -> str:
        # ComfyUI's own names are diffusers'. It finds layers with the prefix `transformer.` too, but diffusers then
        # does not find alpha.
        return f"diffusion_model.{key}"

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        from trainer.model.qwen import tiny

        tiny.save_tiny_checkpoint(folder)
        return ["model.suggested.precision=fp32", f"model.path={folder}", "dataset.resolution=32"]

    def _vae_scale_factor(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** len(self.component_config("vae")["temperal_downsample"])
