"""Pictures from a network: the settings of sampling, and the loop from noise to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.errors import Usage
from trainer.streams import normal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trainer.model import Encoder, Family


@dataclass(slots=True)
class Sampling:
    """Null `steps` and `guidance` are the family's own. `prompts` and `images` (control pictures) are what `stage=sample` draws."""

    steps: int | None = None
    seed: int = 0
    guidance: float | None = None
    prompts: list[str] | None = None
    images: list[str] | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise Usage(f"sample.steps={self.steps} draws nothing; type 1 or more")
        if self.images and not self.prompts:
            raise Usage("sample.images needs prompts to go with it; type sample.prompts=['what to draw']")
        if self.images and self.prompts and len(self.images) not in (1, len(self.prompts)):
            raise Usage(
                f"sample.images names {len(self.images)} pictures for {len(self.prompts)} prompts; name one for all prompts, or one for each"
            )


def pictures(
    family: Family,
    predict: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], float | None], torch.Tensor],
    encoder: Encoder,
    rows: list[dict[str, torch.Tensor]],
    seeds: list[int],
    settings: Sampling,
    device: torch.device,
    at_once: int,
) -> Iterator[np.ndarray]:
    """One picture, uint8 (H, W, 3), for each row of conditions (its `latents` give the shape) and seed."""
    import torch

    for start in range(0, len(rows), at_once):
        chunk = rows[start : start + at_once]
        first = torch.stack([normal(tuple(row["latents"].shape), "sample", seed) for row, seed in zip(chunk, seeds[start:], strict=False)])
        cond = {name: torch.stack([row[name] for row in chunk]).to(device) for name in chunk[0] if name != "latents"}

        def step(x: torch.Tensor, t: torch.Tensor, cond: dict = cond) -> torch.Tensor:
            return predict(x, t, cond, settings.guidance)

        with torch.no_grad():
            latents = family.objective.sample(step, first.to(device), settings.steps, family.shift(*first.shape[2:]))
        images = encoder.decode(latents).permute(0, 2, 3, 1).mul(255).round().byte().cpu().numpy()
        yield from images
