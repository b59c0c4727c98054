"""PMG (Shen et al. 2024, arXiv 2404.08677): a frozen language model reads what a user liked and writes the condition of a frozen denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core.errors import DataError, UsageError
from trainer.model import KINDS, Weights, located, recipe_digest
from trainer.model.unet import UNet

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class PMG(UNet):
    """`path` is the denoiser's checkpoint, `llm` that of the language model: a folder or hub id of any causal one of transformers. Of a longer
    history than `max_sequence_length` tokens the end is read."""

    llm: str | None = None
    llm_revision: str | None = None
    max_sequence_length: int = 600

    methods = ("soft_prompt",)
    components = ("llm", "vae", "unet", "scheduler")
    targets = ()
    keep_high = ("unet.time_embedding", "unet.*.time_emb_proj")
    texts = ()

    def __post_init__(self) -> None:
        UNet.__post_init__(self)
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

    def component(self, name: str) -> Path:
        if name == "llm":
            return located("llm", self.llm, self.llm_revision, [f"*{kind}" for kind in sorted(KINDS)])
        return UNet.component(self, name)

    def meta_model(self) -> torch.nn.Module:
        from transformers import AutoModel

        from trainer.model import on_meta_device
        from trainer.model.prompted import Prompted

        unet = UNet.meta_model(self)
        with on_meta_device():
            return Prompted(AutoModel.from_config(self._llm_config()), unet)

    def weights(self, folder: Path | None = None) -> PromptedWeights:
        from transformers import AutoModel

        prefix = AutoModel._model_mapping[type(self._llm_config())].base_model_prefix
        return PromptedWeights(Weights(self.component("llm"), "model"), prefix, UNet.weights(self, folder))

    def predict(
        self, network, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor], guidance: float | None = None
    ) -> torch.Tensor:
        prompt = network.condition(cond["tokens"].long(), cond["tokens_mask"].long())
        return UNet.predict(self, network.unet, x, t, {"prompt": prompt}, guidance)

    def _llm_config(self):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.component("llm"))

    def _word_parts(self) -> tuple[str, ...]:
        return ("tokens", "tokens_mask")

    def _word_maker(self, part: str, components: dict[str, str]) -> str:
        return recipe_digest(components["llm"], self.max_sequence_length)

    def _word_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self._word_parts(), (self.max_sequence_length,))

    def caption_tokens(self, captions: Sequence[str]) -> tuple[list[int], int]:
        read = tokenizer(self.component("llm"))
        return [len(read(caption, verbose=False).input_ids) for caption in captions], self.max_sequence_length

    def tokens(self, text: str, caption: str) -> torch.Tensor:
        """Token ids of a history, (L,), or ("_mask") as many ones."""
        import torch

        ids = tokenizer(self.component("llm"))(caption, return_tensors="pt").input_ids[0]
        if len(ids) > self.max_sequence_length:
            # The first is the sign that begins every text.
            ids = torch.cat([ids[:1], ids[1 - self.max_sequence_length :]])
        return torch.ones_like(ids) if text == "_mask" else ids

    @classmethod
    def tiny(cls, folder: Path) -> list[str]:
        from trainer.model.prompted.tiny import save

        save(folder / "denoiser", folder / "llm")
        return [
            f"model.path={folder / 'denoiser'}",
            f"model.llm={folder / 'llm'}",
            "model.max_sequence_length=48",
            "dataset.resolution=32",
        ]


class PromptedWeights:
    """Those of the denoiser and of the language model, whose files call it `prefix`; see `trainer.model.Weights`."""

    def __init__(self, llm: Weights, prefix: str, unet: Weights):
        self.llm, self.prefix, self.unet = llm, prefix, unet

    def __call__(self, name: str) -> torch.Tensor:
        part, _, own = name.partition(".")
        if part == "unet":
            return self.unet(own)
        try:
            return self.llm(f"{self.prefix}.{own}")
        except DataError:
            return self.llm(own)

    def types(self) -> dict[str, str]:
        llm = {f"llm.{name.removeprefix(f'{self.prefix}.')}": kind for name, kind in self.llm.types().items()}
        return llm | {f"unet.{name}": kind for name, kind in self.unet.types().items()}


@cache
def tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
