"""Pictures from a network: the settings of sampling, and the loop from noise to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trainer.core.batch import Example, collate, get_conditions, group_by_shape
from trainer.core.rng import normal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trainer.config.sections import Sampling
    from trainer.model import Encoder, Family


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
        return {name: tensor.to(device) for name, tensor in collate([get_conditions(rows[i]) for i in chunk]).items()}

    for chunk in group_by_shape(rows, at_once):
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
