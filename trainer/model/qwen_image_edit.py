"""Qwen-Image-Edit (Qwen 2025): a flow transformer that reads control pictures as further tokens, and whose prompt is read by a language model
that sees the control pictures too.

Follows diffusers' QwenImageEditPipeline and, with `numbered`, QwenImageEditPlusPipeline: the tensors that reach the transformer are the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core import files
from trainer.core.errors import DataError, UsageError
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
from trainer.model.flux_kontext import PATCH, pack, resolution_shift, unpack
from trainer.objective import Flow

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import Qwen2VLImageProcessorPil

    from trainer.dataset.view import TransformedSample

SYSTEM = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n"
)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
DROPPED = 64
"""Tokens of SYSTEM, whose states the transformer never sees."""
PICTURE_TOKEN = "<|image_pad|>"
VISION_MULTIPLE = 32
"""Pixels by which the sides of what the language model sees are divisible in the Plus pipeline."""


@dataclass(slots=True)
class QwenImageEdit(Family):
    text_length: int = 512
    """The longest instruction in tokens, with what the template puts around it but without its pictures; what is longer is refused."""
    numbered: bool = False
    """Whether the instruction calls the control pictures "Picture 1", "Picture 2" ...: what Plus was trained with, and several need."""
    vision_area: int | None = None
    """Pixels of a control picture as the language model sees it, in about its own aspect ratio; null: it sees what the VAE sees."""
    objective: Flow = field(default_factory=Flow)

    classifier_free = True
    components = ("vae", "text_encoder", "tokenizer", "processor", "transformer", "scheduler")
    # Of the picture's stream. What the last block makes of the text leads nowhere: adapters on the text's queries, output and MLP would hold
    # some that never train.
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    keep_high = ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out")

    def __post_init__(self) -> None:
        Family.__post_init__(self)
        if self.text_length < 1:
            raise UsageError(
                f"model.text_length={self.text_length} leaves no token for the prompt; type model.text_length=512"
            )
        if self.vision_area is not None and self.vision_area < VISION_MULTIPLE**2:
            raise UsageError(
                f"model.vision_area={self.vision_area} is no picture; type 147456 for 384 x 384 pixels, or null"
            )

    @property
    def controls(self) -> range:
        return range(1, 10 if self.numbered else 2)

    @property
    def multiple(self) -> int:
        return PATCH * self._scale()

    def parts(self, components: dict[str, str], controls: int) -> dict[str, Recipe]:
        dtype = self.encoder_dtype.value
        picture = recipe_digest(components["vae"], dtype)
        text = [components[name] for name in ("text_encoder", "tokenizer", "processor")]
        prompt = Recipe(
            ("caption", "controls"), recipe_digest(*text, SYSTEM, ANSWER, self.numbered, self.vision_area, dtype)
        )
        # The mask says which states of a micro-batch are no padding.
        parts = {"latents": Recipe(("image",), picture), "prompt": prompt, "prompt_mask": prompt}
        return parts | {name: Recipe((name,), picture) for name in control_names(controls)}

    def spec(self, height: int, width: int, controls: Sequence[tuple[int, int]] = ()) -> dict[str, tuple[int, ...]]:
        scale, transformer = self._scale(), self.config("transformer")
        pictures = _processor(self.folder() / "processor")
        seen = [vision_size(*size, self.vision_area)[::-1] if self.vision_area else size for size in controls]
        tokens = self.text_length + sum(
            pictures.get_number_of_image_patches(*size, {}) // pictures.merge_size**2 for size in seen
        )

        def latents(height: int, width: int) -> tuple[int, ...]:
            return transformer["in_channels"] // PATCH**2, height // scale, width // scale

        spec = {
            "latents": latents(height, width),
            "prompt": (tokens, transformer["joint_attention_dim"]),
            "prompt_mask": (tokens,),
        }
        return spec | {name: latents(*size) for name, size in zip(control_names(len(controls)), controls, strict=True)}

    def encoder(self, device: torch.device) -> QwenEncoder:
        quiet_libraries()
        return QwenEncoder(self, device)

    def meta_model(self) -> torch.nn.Module:
        from diffusers import QwenImageTransformer2DModel

        # The published config has entries of no use, which are told of.
        quiet_libraries()
        with on_meta_device():
            return QwenImageTransformer2DModel.from_config(self.config("transformer"))

    def predict(
        self, network, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor], guidance: float | None = None
    ) -> torch.Tensor:
        import torch

        # Autocast to float16 joins no bfloat16, in which latents may be cached.
        pictures = [x, *(cond[name].to(x.dtype) for name in control_names(len(cond)) if name in cond)]
        shapes = [(1, picture.shape[2] // PATCH, picture.shape[3] // PATCH) for picture in pictures]
        tokens = [pack(picture) for picture in pictures]
        out = network(
            hidden_states=torch.cat(tokens, 1),
            encoder_hidden_states=cond["prompt"].to(x.dtype),
            # Without it padding would be read as text.
            encoder_hidden_states_mask=cond["prompt_mask"].bool(),
            timestep=t,
            # Only the first sample's shapes count: a micro-batch has one size of each picture.
            img_shapes=[shapes] * len(x),
            return_dict=False,
        )[0]
        return unpack(out[:, : tokens[0].shape[1]], *x.shape[2:])

    def guided(self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
        """Classifier-free guidance whose tokens keep the norm that they have with the prompt, as the pipeline has it."""
        captioned, guided = pack(conditional), pack(Family.guided(self, conditional, unconditional, guidance))
        rescaled = guided * (captioned.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack(rescaled, *conditional.shape[2:])

    def export_name(self, key: str) -> str:
        # ComfyUI's own names are diffusers'. With `transformer.` before them it finds them too, but diffusers then does not find alpha.
        return f"diffusion_model.{key}"

    def save_adapter(self, weights: dict[str, torch.Tensor], adapter: dict, path: Path) -> None:
        from diffusers import QwenImageEditPipeline

        # Without the metadata a loader takes alpha for the rank; with the dropout in it a pipeline would draw with dropout.
        metadata = adapter | {"lora_dropout": 0.0, "inference_mode": True}
        with files.from_safetensors(path):
            QwenImageEditPipeline.save_lora_weights(
                path.parent,
                transformer_lora_layers=weights,
                weight_name=path.name,
                transformer_lora_adapter_metadata=metadata,
            )

    def load_adapter(self, path: Path) -> torch.nn.Module:
        from diffusers import QwenImageEditPipeline

        quiet_libraries()
        network = empty_model(self.meta_model())
        weights, metadata = QwenImageEditPipeline.lora_state_dict(
            path.parent, weight_name=path.name, return_lora_metadata=True, local_files_only=True, use_safetensors=True
        )
        QwenImageEditPipeline.load_lora_into_transformer(
            weights, transformer=network, metadata=metadata, low_cpu_mem_usage=True
        )
        return network

    @classmethod
    def tiny(cls, folder: Path) -> list[str]:
        import torch
        from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

        quiet_libraries()
        torch.manual_seed(1)
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(folder / "tokenizer")
        tokenizer.save_pretrained(folder / "processor")
        Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
        # Large initial weights keep different prompts far apart.
        small = {"hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.5}
        text = small | {
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        }
        named = ("image_pad", "video_pad", "vision_start", "vision_end")
        ids = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in named])
        language = Qwen2_5_VLConfig(
            text_config=text,
            vision_config=small | {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]},
            **dict(
                zip(
                    ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
                    ids,
                    strict=True,
                )
            ),
        )
        Qwen2_5_VLForConditionalGeneration(language).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
        AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 0.8, 1.1, 1.4],
        ).save_pretrained(folder / "vae")
        QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ).to(torch.bfloat16).save_pretrained(folder / "transformer")
        # The published checkpoint's.
        FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ).save_pretrained(folder / "scheduler")
        classes = {
            "processor": ("transformers", "Qwen2VLProcessor"),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
            "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
            "tokenizer": ("transformers", "Qwen2Tokenizer"),
            "transformer": ("diffusers", "QwenImageTransformer2DModel"),
            "vae": ("diffusers", "AutoencoderKLQwenImage"),
        }
        index = {"_class_name": "QwenImageEditPipeline", "_diffusers_version": "0.42.1", **classes}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        return [f"model.path={folder}", "dataset.resolution=32"]

    def shift(self, height: int, width: int) -> float:
        return resolution_shift(self.config("scheduler"), height, width)

    def _scale(self) -> int:
        """Pixels a latent pixel."""
        return 2 ** len(self.config("vae")["temperal_downsample"])


def vision_size(height: int, width: int, area: int) -> tuple[int, int]:
    """(width, height) of about `area` pixels and the picture's aspect ratio (the Plus pipeline's `calculate_dimensions`)."""
    across = math.sqrt(area * (width / height))
    return tuple(
        max(1, round(side / VISION_MULTIPLE)) * VISION_MULTIPLE for side in (across, across / (width / height))
    )


@cache
def _processor(folder: Path) -> Qwen2VLImageProcessorPil:
    """What makes patches of pictures. Of its two kinds that without torchvision: what is cached is the same with and without it."""
    from transformers import Qwen2VLImageProcessorPil

    try:
        return Qwen2VLImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} cannot be read ({error}), so it is no checkpoint of this model; type another model.path"
        ) from error


class QwenEncoder:
    """VAE and language model of one checkpoint folder; see `trainer.model.Encoder`."""

    def __init__(self, family: QwenImageEdit, device: torch.device):
        import torch

        self.family, self.folder, self.device = family, family.folder(), device
        self.dtype = getattr(torch, family.encoder_dtype.value)

    def encode(self, part: str, view: TransformedSample) -> torch.Tensor:
        import torch

        with torch.no_grad():
            if part == "prompt":
                return self._prompt(view).cpu()
            if part == "prompt_mask":
                return torch.ones(self.inputs(view)["input_ids"].shape[1] - DROPPED, dtype=torch.bool)
            return self._latents(view.picture("image" if part == "latents" else part)).cpu()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.no_grad():
            mean, std = self._scales()
            images = self._vae.decode(latents[:, :, None].to(self.device, self.dtype) * std + mean).sample[:, :, 0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def inputs(self, view: TransformedSample) -> dict[str, torch.Tensor]:
        """What the language model is given: the template with the instruction, and the control pictures in it. Raises errors.DataError."""
        tokenizer, processor = self._tokenizer, _processor(self.folder / "processor")
        pictures = processor(
            [self._seen(picture) for picture in view.control_pixels()],
            input_data_format="channels_last",
            return_tensors="pt",
        )
        counts = (pictures["image_grid_thw"].prod(1) // processor.merge_size**2).tolist()
        prompt = SYSTEM
        for number, count in enumerate(counts, 1):
            prompt += f"Picture {number}: " if self.family.numbered else ""
            prompt += f"<|vision_start|>{PICTURE_TOKEN * count}<|vision_end|>"
        tokens = tokenizer(prompt + view.caption + ANSWER, return_tensors="pt")
        length = tokens.input_ids.shape[1] - DROPPED - sum(counts)
        if length > self.family.text_length:
            raise DataError(
                f"sample {view.sample.id}: its instruction has {length} tokens (with the template), and at most {self.family.text_length} "
                f"are read; shorten it, or type model.text_length={length}"
            )
        # diffusers 0.42's pipelines leave these out, without which transformers 5 takes places in a picture for places in a line
        # (github.com/huggingface/diffusers/issues/14194). The model was trained with them.
        kinds = (tokens.input_ids == tokenizer.convert_tokens_to_ids(PICTURE_TOKEN)).int()
        return {**tokens, **pictures, "mm_token_type_ids": kinds}

    def _seen(self, picture: np.ndarray) -> np.ndarray:
        """A control picture as the language model sees it."""
        if self.family.vision_area is None:
            return picture
        import numpy as np
        from diffusers.image_processor import VaeImageProcessor

        pictures, (width, height) = VaeImageProcessor(), vision_size(*picture.shape[:2], self.family.vision_area)
        return np.asarray(pictures.resize(pictures.numpy_to_pil(picture / 255)[0], height, width))

    def _prompt(self, view: TransformedSample) -> torch.Tensor:
        inputs = {name: tensor.to(self.device) for name, tensor in self.inputs(view).items()}
        return self._language(**inputs).last_hidden_state[0, DROPPED:]

    def _latents(self, picture: np.ndarray) -> torch.Tensor:
        import torch

        # A video of one frame.
        pixels = torch.from_numpy(picture).to(self.device).permute(2, 0, 1)[None, :, None].to(self.dtype) / 127.5 - 1
        mean, std = self._scales()
        return ((self._vae.encode(pixels).latent_dist.mode() - mean) / std)[0, :, 0]

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel, (C, 1, 1, 1)."""
        import torch

        config = self._vae.config
        return tuple(
            torch.tensor(values).view(-1, 1, 1, 1).to(self.device, self.dtype)
            for values in (config.latents_mean, config.latents_std)
        )

    @cached_property
    def _vae(self):
        from diffusers import AutoencoderKLQwenImage

        return AutoencoderKLQwenImage.from_pretrained(
            self.folder, subfolder="vae", torch_dtype=self.dtype, use_safetensors=True
        ).to(self.device)

    @cached_property
    def _language(self):
        from transformers import Qwen2_5_VLForConditionalGeneration

        # Without the layer that would score the next word.
        return text_model(
            Qwen2_5_VLForConditionalGeneration, self.folder / "text_encoder", self.dtype, self.device
        ).model

    @cached_property
    def _tokenizer(self):
        from transformers import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(self.folder / "tokenizer")


def tiny_tokenizer():
    """A tokenizer whose vocabulary is trained on the template and a few words, so that SYSTEM has as many tokens as with the real one."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    named = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    special = ["<|endoftext|>", *(f"<|{name}|>" for name in named)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
    )
    # The pipeline of Unicode and splitting is the class's own.
    backend = Qwen2Tokenizer().backend_tokenizer
    backend.train_from_iterator([SYSTEM, ANSWER, "Picture 1: ", "make it night", "paint the photo"], trainer)
    model = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]], extra_special_tokens=special[1:])
