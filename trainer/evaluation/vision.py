"""Embeddings of images and texts by models of transformers: CLIP, DINOv2 and others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.core.errors import WeightsError
from trainer.core.hub import download_advice
from trainer.model.pretrained import quiet_libraries

if TYPE_CHECKING:
    import numpy as np
    import torch

T = TypeVar("T")

BATCH_SIZE = 32
"""Images in a forward pass."""


class VisionModel:
    """A vision model: CLIP, SigLIP, DINOv2, or any other that transformers' AutoModel and AutoImageProcessor read.

    `path` is a folder or hub id, and `setting` the name of the setting that holds it. Raises errors.WeightsError.
    """

    def __init__(self, setting: str, path: str, device: torch.device):
        self.setting, self.path, self.device = setting, path, device
        self.model: Any = _load(setting, path, "AutoModel").to(device).eval()
        self._processor: Any = _load(setting, path, "AutoImageProcessor")

    def embed_images(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Returns the embeddings (n, d) float32 of images (H, W, 3) uint8, which may differ in size.

        The embedding of CLIP and SigLIP is the one that they compare with texts. Of other models it is the pooled
        output (the class token, in DINOv2), or the mean of the last hidden states of models without one.
        """
        import numpy as np
        import torch

        found = []
        for batch in _batches(images):
            # The layout is said, because a processor would guess it wrongly of an image that is 3 pixels high.
            inputs = self._processor(images=batch, return_tensors="pt", input_data_format="channels_last")
            with torch.no_grad():
                pixels = inputs["pixel_values"].to(self.device)
                output = self._image_features(pixels)
            found.append(output.float().flatten(1).cpu().numpy())
        return np.concatenate(found)

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=pixels)
        else:
            output = self.model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state.mean(1) if pooled is None else pooled


class ClipModel(VisionModel):
    """A model that embeds images and texts alike: CLIP (Radford et al. 2021) or SigLIP. Raises errors.WeightsError."""

    def __init__(self, setting: str, path: str, device: torch.device):
        VisionModel.__init__(self, setting, path, device)
        if not hasattr(self.model, "get_text_features"):
            raise WeightsError(
                f"{setting}={path} is a {type(self.model).__name__}, which reads no text; type a CLIP model such as "
                f"{EXAMPLES[setting]}"
            )
        self._tokenizer: Any = _load(setting, path, "AutoTokenizer")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the embeddings (n, d) float32 of texts, cut to what the model reads."""
        import numpy as np
        import torch

        length = self.model.config.text_config.max_position_embeddings
        found = []
        for batch in _batches(texts):
            # SigLIP was trained with texts that are padded to its length; CLIP masks the padding.
            inputs = self._tokenizer(
                batch, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            )
            with torch.no_grad():
                output = self.model.get_text_features(**inputs.to(self.device))
            found.append(output.pooler_output.float().cpu().numpy())
        return np.concatenate(found)

    def similarities(self, image: np.ndarray, texts: Sequence[str]) -> list[float]:
        """Returns the cosine similarity of an image (H, W, 3), uint8, and each text."""
        return (normalize(self.embed_texts(texts)) @ normalize(self.embed_images([image]))[0]).tolist()


EXAMPLES = {
    "sample.clip": "openai/clip-vit-base-patch32",
    "evaluation.clip": "openai/clip-vit-base-patch32",
    "evaluation.dino": "facebook/dinov2-base",
    "evaluation.features": "facebook/dinov2-base",
}
"""Setting -> a hub id that it takes."""


def check_readable(setting: str, path: str) -> None:
    """Raises errors.WeightsError if there is no vision model at `path`; reads no weights."""
    _load(setting, path, "AutoConfig")
    _load(setting, path, "AutoImageProcessor")


def _load(setting: str, path: str, kind: str) -> Any:
    """Returns what a class of transformers reads at `path`, the value of `setting`. Raises errors.WeightsError."""
    import transformers

    quiet_libraries()
    try:
        return getattr(transformers, kind).from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{setting}={path}: transformers cannot read it ({kind}: {reason}); type a folder or a hub id such as "
            f"{EXAMPLES[setting]}, {download_advice(error)}"
        ) from error


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH_SIZE)):
        yield batch


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors (n, d) with length 1."""
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(vectors.dtype).tiny)
