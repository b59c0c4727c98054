"""Settings outside the config groups: the stage, and the sections `sample`, `save`, `export`, `log` and `cache`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum

from trainer.core.dtypes import Dtype
from trainer.core.errors import UsageError
from trainer.core.settings import added, path_setting


class Stage(Enum):
    """What a command does."""

    train = "train"
    check = "check"
    cache = "cache"
    evaluate = "evaluate"
    sample = "sample"
    export = "export"
    report = "report"


POST_TRAINING_STAGES = (Stage.evaluate, Stage.sample, Stage.export, Stage.report)
"""Stages that work on an existing run, with the settings of that run."""


@dataclass(slots=True)
class Log:
    """How often metrics are written to the journal."""

    every: int = 1
    """Steps between two entries."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UsageError(f"log.every={self.every} is not a number of steps; type log.every=1 or more")


@dataclass(slots=True)
class AlertLimits:
    """When a run warns about its course; see `trainer.training.alerts`. Null: never."""

    gap: float | None = 0.05
    """Held-out loss minus training loss."""
    rise: float | None = 0.1
    """Share by which the held-out loss is above its lowest value."""
    grad_norm: float | None = 10.0
    """Mean gradient norm of 20 steps, before clipping."""
    memory: float | None = 0.9
    """Used share of the device's memory."""
    slowdown: float | None = 0.5
    """Steps per second, as a share of the most so far."""
    standstill: float | None = 0.002
    """Share by which the held-out loss has fallen after a quarter of the run."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is not None and value < 0:
                raise UsageError(
                    f"alerts.{limit.name}={value:g} is below 0; type a number of 0 or more such as {limit.default}, or "
                    "null for no such warning"
                )


@dataclass(slots=True)
class Save:
    """How often checkpoints are saved, and how many are kept."""

    every: int = 100
    """Steps between two checkpoints."""
    keep: int = 3
    """Number of most recent checkpoints that are kept. The best one is kept as well."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UsageError(f"save.every={self.every} is not a number of steps; type save.every=1 or more")
        if self.keep < 1:
            raise UsageError(
                f"save.keep={self.keep} would leave no checkpoint to resume from; type save.keep=1 or more"
            )


class SplitName(Enum):
    """Part of a dataset."""

    train = "train"
    validation = "validation"
    test = "test"


@dataclass(slots=True)
class Sampling:
    """How images are generated, and which ones `stage=sample` generates."""

    steps: int | None = None
    """Sampling steps; null: the model's default."""
    seed: int = 0
    guidance: float | None = None
    """Guidance scale; null: the model's default."""
    prompts: list[str] | None = None
    """Prompts for `stage=sample`; null: it generates images for samples of the dataset."""
    images: list[str] | None = path_setting(None)
    """Control images for `prompts`: one for all prompts, or one for each."""
    split: SplitName = SplitName.validation
    """Split from which `stage=sample` takes samples if there are no prompts."""
    count: int | None = None
    """Number of samples from the split; null: the whole test split, or `evaluation.images` of another split."""
    preference_weights: list[float] | None = added(None)
    """Values of `model.preference_weight` that `stage=sample` tries for each image, of which it keeps the best."""
    preference_share: float = added(2 / 3)
    """How much the best image owes to the preference, 0 to 1; the rest is the target's share."""
    clip: str | None = added(None, path=True)
    """Folder or hub id of the CLIP model that compares these images with the keywords."""

    def __post_init__(self) -> None:
        self._check_preference()
        if self.count is not None and self.count < 1:
            raise UsageError(f"sample.count={self.count} generates no image; type sample.count=1 or more, or null")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"sample.steps={self.steps} generates no image; type sample.steps=1 or more")
        if self.images and not self.prompts:
            raise UsageError("sample.images needs prompts; type sample.prompts=['what the image shows'] as well")
        if self.images and self.prompts and len(self.images) not in (1, len(self.prompts)):
            raise UsageError(
                f"sample.images names {len(self.images)} images for {len(self.prompts)} prompts; name one image for "
                "all prompts, or one for each prompt"
            )

    def _check_preference(self) -> None:
        if not 0 <= self.preference_share <= 1:
            raise UsageError(
                f"sample.preference_share={self.preference_share:g} is not a share; type 0 to 1, such as 0.5"
            )
        weights = self.preference_weights
        if weights is None:
            return
        if not weights or min(weights) < 0 or len(set(weights)) < len(weights):
            raise UsageError(
                f"sample.preference_weights={weights} must be different numbers, 0 or more; type [1,2], or null"
            )
        if self.clip is None:
            raise UsageError(
                "sample.preference_weights needs a CLIP model that chooses between the images; type "
                "sample.clip=FOLDER, or a hub id such as openai/clip-vit-base-patch32"
            )


class Format(Enum):
    """Format of an export. The value is the name of the file or folder in the export folder.

    - `diffusers`: a file for a pipeline's `load_lora_weights`.
    - `peft`: a folder for `PeftModel.from_pretrained`.
    - `comfyui`: a file for ComfyUI, which reads no metadata.
    - `pipeline`: a complete checkpoint with the trained weights merged into it, for `model.path` and diffusers.
    - `single_file`: the same as one file in the layout of the program that the model was published with, for A1111 and
      ComfyUI. It holds the components that such files usually hold.
    - `soft_prompt`: a file for `method.init_from`.
    """

    diffusers = "pytorch_lora_weights.safetensors"
    peft = "peft"
    comfyui = "comfyui.safetensors"
    pipeline = "pipeline"
    single_file = "single_file.safetensors"
    soft_prompt = "soft_prompt.safetensors"


@dataclass(slots=True)
class Export:
    """In which formats the trained weights are exported."""

    formats: list[Format] | None = None
    """Null: the first format that the method supports. That of a full fine-tune is a complete checkpoint, several GB
    for most models; an empty list writes no export at the end of training."""
    dtype: Dtype | None = None
    """Null: float32 for adapters; for a complete checkpoint the dtype of the weights in training, or the compute dtype
    if they are quantized."""

    def select(self, supported: tuple[str, ...], unsupported: Mapping[str, str]) -> list[Format]:
        """Returns the formats to write, given the names of those that the method supports.

        `unsupported` are those that the model lacks, and why. Raises errors.UsageError if `formats` has others.
        """
        available = [name for name in supported if name not in unsupported]
        if self.formats is None:
            return [Format[name] for name in available[:1]]
        remedy = f"type export.formats=[{','.join(available)}]"
        names = [format.name for format in self.formats]
        wrong = [name for name in names if name not in supported]
        if wrong:
            raise UsageError(f"export.formats: {', '.join(wrong)} cannot hold what this method trains; {remedy}")
        absent = [name for name in names if name in unsupported]
        if absent:
            reason = unsupported[absent[0]]
            raise UsageError(f"export.formats: {absent[0]} does not exist for this model ({reason}); {remedy}")
        return list(dict.fromkeys(self.formats))


@dataclass(slots=True)
class CacheSettings:
    """Where encoder outputs are cached, and how they are checked."""

    path: str | None = path_setting(None)
    """Folder of the cache; null: `<out>/cache`."""
    verify: str = "quick"
    """`quick` checks an entry when it is first used. `full` checks all entries of a run before it starts, and encodes
    damaged ones again."""
    workers: int = 1
    """Number of processes that encode."""
    drop_unused: bool = False
    """With `stage=cache`: delete the entries that neither this run nor any run in the output folder uses."""

    def __post_init__(self) -> None:
        if self.verify not in ("quick", "full"):
            raise UsageError(f"cache.verify={self.verify} is unknown; type quick or full")
        if self.workers < 1:
            raise UsageError(f"cache.workers={self.workers} encodes nothing; type cache.workers=1 or more")
