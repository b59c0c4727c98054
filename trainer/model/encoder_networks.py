"""The frozen encoders of a checkpoint without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.core import documents
from trainer.model.checkpoint_files import MODEL_INDEX
from trainer.model.pretrained import quiet_libraries
from trainer.model.weights import on_meta_device

if TYPE_CHECKING:
    import torch

    from trainer.model import Family


def meta_encoder(family: Family, component: str) -> torch.nn.Module:
    """Returns one of the `encoders` of a family on the meta device.

    Its class is the one that `model_index.json` names. Raises errors.DataError if the file does not name it.
    """
    import diffusers
    import transformers

    quiet_libraries()
    path = family.folder() / MODEL_INDEX
    _, name = documents.expect(documents.read_json(path).get(component), list, f"{component} in {path}")
    folder = family.component_folder(component)
    kind: Any = getattr(diffusers, name, None) or getattr(transformers, name)
    with on_meta_device():
        if issubclass(kind, transformers.PreTrainedModel):
            return kind(kind.config_class.from_pretrained(folder)).eval()
        return kind.from_config(kind.load_config(folder)).eval()
