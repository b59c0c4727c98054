"""Pictures from a network: the settings of sampling, and the loop from noise to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from trainer.core.batch import Example, chunks, collate, conditions
from trainer.core.errors import UsageError
from trainer.core.rng import normal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trainer.model import Encoder, Family


class Side(Enum):
    """Part of a data set."""

    train = "train"
    validation = "validation"
    test = "test"


@dataclass(slots=True)
class Sampling:
    """Null `steps` and `guidance` are the family's own. `prompts` and `images` (control pictures) are what `stage=sample` draws; without them
    `count` samples of the data set's `split` (null: as many as an evaluation draws, of a test split all)."""

    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    prompts: list[str] | None = None
    images: list[str] | None = None
    split: Side = Side.validation
    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise UsageError(f"sample.count={self.count} draws nothing; type 1 or more, or null")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"sample.steps={self.steps} draws nothing; type 1 or more")
        if self.images and not self.prompts:
            raise UsageError("sample.images needs prompts to go with it; type sample.prompts=['what to draw']")
        if self.images and self.prompts and len(self.images) not in (1, len(self.prompts)):
            raise UsageError(
                f"sample.images names {len(self.images)} pictures for {len(self.prompts)} prompts; name one for all prompts, or one for each"
            )


def pictures(
    family: Family,
    predict: Callable[[torch.Tensor, torch.Tensor, Example, float | None], torch.Tensor],
    encoder: Encoder,
    rows: list[Example],
    unconditional: list[Example] | None,
    seeds: list[int],
    settings: Sampling,
    device: torch.device,
    at_once: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """The place of a row and its picture, uint8 (H, W, 3), for each row of conditions (its `latents` give the shape) and seed; sizes one by one.

    `unconditional` are the rows of the same samples without their captions, for classifier-free guidance (Ho & Salimans 2022); None: none.
    """
    import torch

    def joined(rows: list[Example], chunk: list[int]) -> Example:
        return {name: tensor.to(device) for name, tensor in collate([conditions(rows[i]) for i in chunk]).items()}

    for chunk in chunks(rows, at_once):
        first = torch.stack([normal(tuple(rows[i]["latents"].shape), "sample", seeds[i]) for i in chunk]).to(device)
        captioned, bare = joined(rows, chunk), unconditional and joined(unconditional, chunk)

        def step(
            x: torch.Tensor, t: torch.Tensor, captioned: Example = captioned, bare: Example | None = bare
        ) -> torch.Tensor:
            prediction = predict(x, t, captioned, settings.guidance)
            return (
                family.guided(prediction, predict(x, t, bare, settings.guidance), settings.guidance)
                if bare
                else prediction
            )

        with torch.no_grad():
            latents = family.objective.sample(step, first, settings.steps, family.shift(*first.shape[2:]))
        images = encoder.decode(latents).permute(0, 2, 3, 1).mul(255).round().byte().cpu().numpy()
        yield from zip(chunk, images, strict=True)
