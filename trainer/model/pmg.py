"""PMG (Shen et al. 2024, arXiv 2404.08677): images to the taste of a user.

A frozen language model reads what a user liked and conditions a frozen Stable Diffusion UNet through a soft prompt,
which is all that is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trainer.core.errors import UsageError
from trainer.core.settings import added, path_setting
from trainer.model import Recipe
from trainer.model.checkpoint_files import SUFFIXES, locate, recipe_digest
from trainer.model.configs import ConfigRules
from trainer.model.pretrained import quiet_libraries
from trainer.model.unet.family import UNetFamily, load_clip_tokenizer
from trainer.model.weights import (
    TRANSFORMERS_WEIGHTS,
    CombinedWeights,
    ComponentWeights,
    WeightReader,
    on_meta_device,
)

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch, Example
    from trainer.model.llm_unet.encoder import LLMUNetEncoder

KEYWORDS = ("target", "preference")
"""What the language model writes keywords for."""


@dataclass(slots=True)
class PMG(UNetFamily):
    """`path` is the denoiser's checkpoint, `llm` a folder or hub id of any causal language model of transformers.

    If a history is longer than `max_sequence_length` tokens, only its end is read.
    """

    llm: str | None = path_setting(None)
    llm_revision: str | None = None
    max_sequence_length: int = 600
    keywords: bool = added(False)
    """Whether the UNet also attends to keywords that the language model writes for the target and the preference."""
    keyword_tokens: int = added(100)
    """Largest number of tokens that it writes for either."""
    preference_weight: float | None = added(None)
    """Factor of the soft prompt's states and those of the preference keywords; the target keywords have 1."""
    negative_prompt: str | None = added(None)
    """What guidance leads away from in sampling; null: an empty history."""
    negative_tokens: int | None = added(None)
    """Number of tokens of the negative prompt, with the first and the last; null: as many as the text encoder reads."""

    default_config = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    unused_file_keys = ("cond_stage_model.",)
    methods = ("soft_prompt",)
    target_modules = ()
    unquantized_modules = ("unet.time_embedding", "unet.*.time_emb_proj")
    text_suffixes = ()
    caption_tensors = ("tokens", "tokens_mask")

    def __post_init__(self) -> None:
        UNetFamily.__post_init__(self)
        if not self.llm:
            raise UsageError(
                "model.llm is not set; type model.llm=FOLDER of a causal language model, or a hub id such as owner/name"
            )
        if self.max_sequence_length < 2:
            raise UsageError(
                f"model.max_sequence_length={self.max_sequence_length} leaves no history to read; type 600"
            )
        if self.train_text_encoder:
            raise UsageError("model.train_text_encoder: the language model stays frozen here; leave it out")
        if self.keyword_tokens < 1:
            raise UsageError(
                f"model.keyword_tokens={self.keyword_tokens} writes no keyword; type 1 or more, such as 100"
            )
        if self.preference_weight is not None and self.preference_weight < 0:
            raise UsageError(
                f"model.preference_weight={self.preference_weight:g} is negative; type 0 for no preference, or 2"
            )
        if self.negative_tokens is not None and (self.negative_prompt is None or self.negative_tokens < 2):
            raise UsageError(
                f"model.negative_tokens={self.negative_tokens} needs model.negative_prompt and must be 2 or more; "
                "leave it out to use the whole prompt"
            )

    @property
    def components(self) -> tuple[str, ...]:
        clip = ("text_encoder", "tokenizer") if self._reads_clip else ()
        return ("llm", "vae", *clip, "unet", "scheduler")

    @property
    def text_fields(self) -> tuple[str, ...]:
        return tuple(f"{kind}_prompt" for kind in KEYWORDS) if self.keywords else ()

    @property
    def _reads_clip(self) -> bool:
        """Whether the checkpoint's text encoder is used."""
        return self.keywords or self.negative_prompt is not None

    @property
    def encoders(self) -> tuple[str, ...]:
        writer = ("llm",) if self.keywords else ()
        return ("text_encoder", *writer) if self._reads_clip else ()

    @classmethod
    def text_encoder_class(cls, suffix: str) -> Any:
        from transformers import CLIPTextModel

        return CLIPTextModel

    def config_rules(self) -> dict[str, ConfigRules]:
        rules = UNetFamily.config_rules(self)
        if not self._reads_clip:
            return rules
        return rules | {"text_encoder": ConfigRules("CLIPTextModel", model_type="clip_text_model")}

    def component_folder(self, component: str) -> Path:
        if component == "llm":
            assert self.llm is not None
            return locate("llm", self.llm, self.llm_revision, [f"*{suffix}" for suffix in SUFFIXES])
        return UNetFamily.component_folder(self, component)

    def meta_model(self) -> torch.nn.Module:
        from transformers import AutoModel

        from trainer.model.llm_unet.network import LLMConditionedUNet

        unet = UNetFamily.meta_model(self)
        with on_meta_device():
            return LLMConditionedUNet(AutoModel.from_config(self._llm_config()), unet)

    def weights(self, checkpoint: Path | None = None) -> WeightReader:
        return CombinedWeights({name: self.component_weights(name, checkpoint) for name in ("llm", "unet")})

    def folder_weights(self, component: str, folder: Path) -> WeightReader:
        if component != "llm":
            return UNetFamily.folder_weights(self, component, folder)
        from transformers import AutoModel

        # The checkpoint of a causal model has a head, and calls the decoder by this name.
        model_class: Any = AutoModel._model_mapping[type(self._llm_config())]
        return ComponentWeights(folder, TRANSFORMERS_WEIGHTS, f"{model_class.base_model_prefix}.")

    def _llm_config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.component_folder("llm"))

    def predict(
        self, network: Any, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        import torch

        if guidance is not None and "negative" in conditions:
            negative = conditions["negative"].flatten(1).any(1)
            if negative.all():
                return UNetFamily.predict(self, network.unet, latents, t, {"prompt": conditions["negative"]}, guidance)
            if negative.any():
                # A typed prompt may be empty, too. The others attend to another number of states.
                rows = [slice(i, i + 1) for i in range(len(latents))]
                parts = [{name: tensor[row] for name, tensor in conditions.items()} for row in rows]
                return torch.cat(
                    [
                        self.predict(network, latents[row], t[row], part, guidance)
                        for row, part in zip(rows, parts, strict=True)
                    ]
                )
        prompt = self.prompt_states(network, conditions)
        return UNetFamily.predict(self, network.unet, latents, t, {"prompt": prompt}, guidance)

    def prompt_states(self, network: Any, conditions: Batch) -> torch.Tensor:
        """Returns what the UNet attends to, (B, n, width): target keywords, preference keywords, soft prompt."""
        import torch

        soft = network.encode_prompt(conditions["tokens"].long(), conditions["tokens_mask"].long())
        weight = 1.0 if self.preference_weight is None else self.preference_weight
        if weight != 1:
            soft = weight * soft
        if not self.keywords:
            return soft
        target, preference = (conditions[f"{kind}_keywords"].to(soft.dtype) for kind in KEYWORDS)
        return torch.cat([target, weight * preference, soft], 1)

    def recipes(self, digests: dict[str, str], controls: int) -> dict[str, Recipe]:
        recipes = UNetFamily.recipes(self, digests, controls)
        if not self._reads_clip:
            return recipes
        clip = [digests["text_encoder"], digests["tokenizer"], self._dtype_key("text_encoder")]
        if self.keywords:
            dtypes = self._dtype_key("text_encoder", "llm")
            digest = recipe_digest(digests["llm"], self.max_sequence_length, self.keyword_tokens, [*clip[:2], dtypes])
            names = [(kind, f"{kind}_{what}") for kind in KEYWORDS for what in ("words", "keywords")]
            recipes |= {name: Recipe((f"{kind}_prompt",), digest) for kind, name in names}
        if self.negative_prompt is not None:
            recipes["negative"] = Recipe(("caption",), recipe_digest(clip, self.negative_prompt, self.negative_tokens))
        return recipes

    def shapes(
        self, height: int, width: int, control_sizes: Sequence[tuple[int, int]] = ()
    ) -> dict[str, tuple[int, ...]]:
        shapes = UNetFamily.shapes(self, height, width, control_sizes)
        if not self._reads_clip:
            return shapes
        length = self.component_config("text_encoder")["max_position_embeddings"]
        states = self.component_config("unet")["cross_attention_dim"]
        if self.keywords:
            shapes |= {f"{kind}_words": (length,) for kind in KEYWORDS}
            shapes |= {f"{kind}_keywords": (length, states) for kind in KEYWORDS}
        if self.negative_prompt is not None:
            shapes["negative"] = (self.negative_tokens or length, states)
        return shapes

    def build_encoder(self, device: torch.device) -> LLMUNetEncoder:
        from trainer.model.llm_unet.encoder import LLMUNetEncoder

        quiet_libraries()
        return LLMUNetEncoder(self, device)

    def clip_token_ids(self, text: str, length: int | None = None) -> torch.Tensor:
        """Returns `length` token ids of a text for the checkpoint's text encoder; None: as many as it reads."""
        tokenizer = load_clip_tokenizer(self.component_folder("tokenizer"))
        length = length or tokenizer.model_max_length
        tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids[0]

    def _caption_digest(self, name: str, digests: dict[str, str]) -> str:
        return recipe_digest(digests["llm"], self.max_sequence_length)

    def _caption_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.caption_tensors, (self.max_sequence_length,))

    def count_caption_tokens(self, captions: Sequence[str]) -> dict[str, tuple[list[int], int]]:
        tokenizer = load_tokenizer(self.component_folder("llm"))
        counts = [len(tokenizer(caption, verbose=False).input_ids) for caption in captions]
        return {"llm": (counts, self.max_sequence_length)}

    def tokenize(self, name: str, caption: str) -> torch.Tensor:
        """Returns the token ids of a history, (L,), or for "tokens_mask" ones of the same shape."""
        import torch

        ids = load_tokenizer(self.component_folder("llm"))(caption, return_tensors="pt").input_ids[0]
        if len(ids) > self.max_sequence_length:
            # The first token marks the beginning of a text.
            ids = torch.cat([ids[:1], ids[1 - self.max_sequence_length :]])
        return torch.ones_like(ids) if name == "tokens_mask" else ids

    def keywords_of(self, example: Example) -> tuple[str, str]:
        tokenizer = load_clip_tokenizer(self.component_folder("tokenizer"))
        target, preference = (
            tokenizer.decode(example[f"{kind}_words"], skip_special_tokens=True).strip() for kind in KEYWORDS
        )
        return target, preference

    def with_preference_weight(self, weight: float) -> Self:
        return replace(self, preference_weight=weight)

    def decode_tokens(self, token_ids: torch.Tensor) -> str:
        """Returns the text of token ids (L,) of the language model."""
        return load_tokenizer(self.component_folder("llm")).decode(token_ids, skip_special_tokens=True)

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        from trainer.model.llm_unet.tiny import save_tiny_llm
        from trainer.model.sd15 import SD15
        from trainer.model.unet.tiny import save_tiny_checkpoint

        save_tiny_checkpoint(folder / "denoiser", SD15)
        save_tiny_llm(folder / "llm")
        return [
            "model.suggested.precision=fp32",
            f"model.path={folder / 'denoiser'}",
            f"model.llm={folder / 'llm'}",
            "model.max_sequence_length=48",
            "dataset.resolution=32",
        ]


@cache
def load_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer, which is loaded once per process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
