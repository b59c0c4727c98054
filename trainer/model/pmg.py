"""PMG (Shen et al. 2024, arXiv 2404.08677): images to the taste of a user.

A frozen language model reads what a user liked and conditions a frozen Stable Diffusion UNet through a soft prompt,
which is all that is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core.errors import UsageError
from trainer.core.settings import path_setting
from trainer.model.checkpoint_files import SUFFIXES, locate, recipe_digest
from trainer.model.unet.family import UNetFamily
from trainer.model.weights import (
    TRANSFORMERS_WEIGHTS,
    CombinedWeights,
    ComponentWeights,
    WeightReader,
    on_meta_device,
)

if TYPE_CHECKING:
    import torch

    from trainer.core.batch import Batch


@dataclass(slots=True)
class PMG(UNetFamily):
    """`path` is the denoiser's checkpoint, `llm` a folder or hub id of any causal language model of transformers.

    If a history is longer than `max_sequence_length` tokens, only its end is read.
    """

    llm: str | None = path_setting(None)
    llm_revision: str | None = None
    max_sequence_length: int = 600

    default_config = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    unused_file_keys = ("cond_stage_model.",)
    methods = ("soft_prompt",)
    components = ("llm", "vae", "unet", "scheduler")
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
        prompt = network.encode_prompt(conditions["tokens"].long(), conditions["tokens_mask"].long())
        return UNetFamily.predict(self, network.unet, latents, t, {"prompt": prompt}, guidance)

    def _caption_digest(self, name: str, digests: dict[str, str]) -> str:
        return recipe_digest(digests["llm"], self.max_sequence_length)

    def _caption_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.caption_tensors, (self.max_sequence_length,))

    def count_caption_tokens(self, captions: Sequence[str]) -> tuple[list[int], int]:
        tokenizer = load_tokenizer(self.component_folder("llm"))
        return [len(tokenizer(caption, verbose=False).input_ids) for caption in captions], self.max_sequence_length

    def tokenize(self, name: str, caption: str) -> torch.Tensor:
        """Returns the token ids of a history, (L,), or for "tokens_mask" ones of the same shape."""
        import torch

        ids = load_tokenizer(self.component_folder("llm"))(caption, return_tensors="pt").input_ids[0]
        if len(ids) > self.max_sequence_length:
            # The first token marks the beginning of a text.
            ids = torch.cat([ids[:1], ids[1 - self.max_sequence_length :]])
        return torch.ones_like(ids) if name == "tokens_mask" else ids

    @classmethod
    def save_tiny_checkpoint(cls, folder: Path) -> list[str]:
        from trainer.model.llm_unet.tiny import save_tiny_llm
        from trainer.model.sd15 import SD15
        from trainer.model.unet.tiny import save_tiny_checkpoint

        save_tiny_checkpoint(folder / "denoiser", SD15)
        save_tiny_llm(folder / "llm")
        return [
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
