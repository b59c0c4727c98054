"""FLUX.2 [klein] (Black Forest Labs 2026): a flow transformer that reads a language model and control images.

Follows diffusers' Flux2KleinPipeline: the same tensors reach the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.core import documents
from trainer.core.errors import UsageError
from trainer.core.settings import added
from trainer.dataset.sample import control_names
from trainer.model import Family, Recipe
from trainer.model.checkpoint_files import CHAT_TEMPLATE, MODEL_INDEX, SUFFIXES, recipe_digest
from trainer.model.configs import ConfigRules
from trainer.model.flux.scheduler import SCHEDULER_RULES, check_terminal
from trainer.model.flux.tokens import PATCH, control_latents, latent_shapes
from trainer.model.flux2.tokens import empirical_shift, image_positions, pack, text_positions
from trainer.model.pretrained import quiet_libraries
from trainer.model.single_file import Layout
from trainer.model.weights import on_meta_device
from trainer.objective import Flow

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch
    from trainer.model.flux2.encoder import Flux2Encoder


MAX_SINGLE_BLOCKS = 24
"""Single blocks of the largest published model."""


@dataclass(slots=True)
class Flux2Klein(Family):
    """Latents are those of the VAE in patches of 2 x 2, one token each, normalized by the statistics in the VAE."""

    transformer: str | None = added(None, path=True)
    """Replaces the checkpoint's transformer: a safetensors file, a diffusers folder or a hub id."""
    text_length: int = 512
    """Tokens per prompt with the template. The transformer also reads padding, so training and sampling must use the
    same number."""
    text_layers: list[int] = field(default_factory=lambda: [9, 18, 27])
    """Layers of the language model whose states are the prompt."""
    objective: Flow = field(default_factory=Flow)

    suffixes = (*SUFFIXES, CHAT_TEMPLATE)
    components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    alpha_tensors = False
    index_keys: ClassVar[Mapping[str, str]] = {"is_distilled": "followed by `classifier_free_guidance`"}
    control_counts = range(11)
    # As in diffusers' train_dreambooth_lora_flux2_klein. The single blocks are numbered, because `attn.to_out` is not a
    # layer in the double blocks.
    target_modules = (
        *("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"),
        *(f"single_transformer_blocks.{number}.attn.to_out" for number in range(MAX_SINGLE_BLOCKS)),
    )
    unquantized_modules = (
        *("x_embedder", "context_embedder", "time_guidance_embed", "norm_out", "proj_out"),
        *("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"),
    )

    def __post_init__(self) -> None:
        Family.__post_init__(self)
        if self.text_length < 1:
            raise UsageError(f"model.text_length={self.text_length} leaves no token for the prompt; type 512")
        if not self.text_layers or min(self.text_layers) < 1:
            raise UsageError(
                f"model.text_layers={self.text_layers} must name layers of the language model, 1 for the first; type "
                "[9,18,27] for FLUX.2"
            )

    @property
    def classifier_free_guidance(self) -> bool:  # type: ignore[override]
        """False for a distilled checkpoint, whose pipeline ignores the guidance."""
        return not documents.read_json(self.folder() / MODEL_INDEX).get("is_distilled", False)

    @property
    def size_multiple(self) -> int:
        return PATCH * self._vae_scale_factor()

    def recipes(self, digests: dict[str, str], controls: int) -> dict[str, Recipe]:
        dtypes = {name: self.encoder_dtype_of(name).value for name in ("vae", "text_encoder")}
        vae = recipe_digest(digests["vae"], dtypes["vae"])
        language_model = [digests["text_encoder"], digests["tokenizer"], dtypes["text_encoder"]]
        return {
            "latents": Recipe(("image",), vae),
            "prompt": Recipe(("caption",), recipe_digest(*language_model, self.text_length, list(self.text_layers))),
            **{name: Recipe((name,), vae) for name in control_names(controls)},
        }

    def shapes(
        self, height: int, width: int, control_sizes: Sequence[tuple[int, int]] = ()
    ) -> dict[str, tuple[int, ...]]:
        transformer = self.component_config("transformer")
        return {
            **latent_shapes(transformer["in_channels"], self.size_multiple, (height, width), control_sizes),
            "prompt": (self.text_length, transformer["joint_attention_dim"]),
        }

    def count_caption_tokens(self, captions: Sequence[str]) -> dict[str, tuple[list[int], int]]:
        from transformers import Qwen2Tokenizer

        from trainer.model.encoders import count_tokens
        from trainer.model.qwen.chat import chat_text

        tokenizer = Qwen2Tokenizer.from_pretrained(self.component_folder("tokenizer"))
        texts = [chat_text(tokenizer, caption, thinking=False) for caption in captions]
        return {"tokenizer": (count_tokens(tokenizer, texts), self.text_length)}

    def build_encoder(self, device: torch.device) -> Flux2Encoder:
        from trainer.model.flux2.encoder import Flux2Encoder

        quiet_libraries()
        return Flux2Encoder(self, device)

    def meta_model(self) -> torch.nn.Module:
        from diffusers import Flux2Transformer2DModel

        with on_meta_device():
            return Flux2Transformer2DModel.from_config(self.component_config("transformer"))

    def original_layout(self, component: str) -> Layout:
        from trainer.model.flux2.original import transformer_layout

        return transformer_layout

    def check_configs(self) -> None:
        Family.check_configs(self)
        check_terminal(self.objective, self.component_config("scheduler").get("shift_terminal"))
        language_model = self.component_config("text_encoder")
        layers, width = language_model["num_hidden_layers"], language_model["hidden_size"]
        expected = self.component_config("transformer")["joint_attention_dim"]
        if max(self.text_layers) > layers or width * len(self.text_layers) != expected:
            raise UsageError(
                f"model.text_layers={self.text_layers}: the transformer reads the states of {expected // width} of the "
                f"{layers} layers of the language model; type [9,18,27] for FLUX.2"
            )

    def config_rules(self) -> dict[str, ConfigRules]:
        channels = self.component_config("vae").get("latent_channels", 32) * PATCH**2
        transformer = {
            "patch_size": (1,),
            "in_channels": (channels,),
            "out_channels": (None, channels),
            # The pipeline passes no guidance to the transformer.
            "guidance_embeds": (False,),
        }
        return {
            "vae": ConfigRules(
                "AutoencoderKLFlux2",
                {"in_channels": (3,), "out_channels": (3,), "patch_size": ([PATCH, PATCH], (PATCH, PATCH))},
            ),
            "text_encoder": ConfigRules("Qwen3ForCausalLM", model_type="qwen3"),
            "transformer": ConfigRules("Flux2Transformer2DModel", transformer),
            "scheduler": SCHEDULER_RULES,
        }

    def time_shift(self, height: int, width: int, steps: int | None = None) -> float:
        return empirical_shift(self.component_config("scheduler"), height * width, steps)

    def predict(
        self, network: Any, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        import torch

        images = [latents, *control_latents(conditions, latents.dtype)]
        prompt = conditions["prompt"].to(latents.dtype)
        output = network(
            hidden_states=torch.cat([pack(image) for image in images], 1),
            encoder_hidden_states=prompt,
            timestep=t,
            img_ids=torch.cat([image_positions(image, number) for number, image in enumerate(images)]),
            txt_ids=text_positions(prompt.shape[1], latents.device),
            guidance=None,
            return_dict=False,
        )[0]
        target = output[:, : latents.shape[2] * latents.shape[3]]
        return target.transpose(1, 2).reshape(latents.shape)

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import Flux2KleinPipeline

        return Flux2KleinPipeline

    def comfyui_key(self, key: str) -> str:
        # ComfyUI knows FLUX.2's layers by diffusers' names (flux_to_diffusers in comfy/utils.py).
        return f"transformer.{key}"

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        from trainer.model.flux2 import tiny

        tiny.save_tiny_checkpoint(folder)
        layers = ",".join(map(str, tiny.TEXT_LAYERS))
        return [
            "model.suggested.precision=fp32",
            f"model.path={folder}",
            f"model.text_length={tiny.TEXT_LENGTH}",
            f"model.text_layers=[{layers}]",
            "dataset.resolution=32",
        ]

    def _vae_scale_factor(self) -> int:
        """Pixels per latent pixel of the VAE, along one side."""
        return 2 ** (len(self.component_config("vae").get("block_out_channels", (128, 256, 512, 512))) - 1)
