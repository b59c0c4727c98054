"""Captions of comma-separated tags, in several orders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.core.rng import generator

if TYPE_CHECKING:
    from trainer.dataset import Dataset


def shuffled_captions(settings: Dataset, caption: str) -> list[str]:
    """Returns the captions that stand for this one in training: itself, or with `shuffle_tags` its tags in
    `tag_orders` random orders, of which some may be equal.

    The first `keep_tags` tags stay in their places. The orders depend on the caption alone, so that runs with
    different seeds share the cached text embeddings.
    """
    tags = split_tags(caption)
    kept, shuffled = tags[: settings.keep_tags], tags[settings.keep_tags :]
    if not settings.shuffle_tags or len(shuffled) < 2:
        return [caption]
    captions = []
    for number in range(settings.tag_orders):
        order = generator("tag order", number, caption).permutation(len(shuffled))
        captions.append(", ".join([*kept, *(shuffled[i] for i in order)]))
    return captions


def split_tags(caption: str) -> list[str]:
    """Returns the tags of a caption without surrounding white space."""
    return [tag for tag in map(str.strip, caption.split(",")) if tag]
