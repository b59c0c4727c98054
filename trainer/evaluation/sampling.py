"""Generates images from noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trainer.core.batch import Batch, Example, collate, get_conditions, group_by_shape
from trainer.core.rng import normal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trainer.model import Encoder, Family


def generate_images(
    family: Family,
    predict: Callable[[torch.Tensor, torch.Tensor, Batch, float], torch.Tensor],
    encoder: Encoder,
    examples: list[Example],
    unconditional: list[Example] | None,
    seeds: list[int],
    *,
    steps: int,
    guidance: float,
    device: torch.device,
    batch_size: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """Generates one image for each example and its seed, and yields (index of the example, image).

    Images are uint8 (H, W, 3); images of equal size are yielded in succession.

    `examples` give the conditions and, by the shape of their `latents`, the size. `unconditional` are the
    examples of the same samples without captions, for classifier-free guidance (Ho & Salimans 2022); None
    disables it. `predict(noisy latents, t, conditions, guidance)` is the network.
    """
    import torch

    def collate_conditions(examples: list[Example], indices: list[int]) -> Batch:
        batch = collate([get_conditions(examples[i]) for i in indices])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    for indices in group_by_shape(examples, batch_size):
        noise = torch.stack([normal(tuple(examples[i]["latents"].shape), "sample", seeds[i]) for i in indices])
        conditional = collate_conditions(examples, indices)
        without_captions = collate_conditions(unconditional, indices) if unconditional else None

        def guided_prediction(
            latents: torch.Tensor,
            t: torch.Tensor,
            conditional: Batch = conditional,
            without_captions: Batch | None = without_captions,
        ) -> torch.Tensor:
            prediction = predict(latents, t, conditional, guidance)
            if without_captions is None:
                return prediction
            return family.apply_guidance(prediction, predict(latents, t, without_captions, guidance), guidance, t)

        with torch.no_grad():
            latents = family.sample(guided_prediction, noise.to(device), steps)
        images = encoder.decode(latents).permute(0, 2, 3, 1).mul(255).round().byte().cpu().numpy()
        yield from zip(indices, images, strict=True)
