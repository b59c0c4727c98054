"""Configs of published models, which come with the program: single files need no network.

`OWNER/NAME/` has the configs of the model with this hub id, and for models that may be single files the tokenizers. A
CLIP tokenizer's `merges.txt` is the part of OpenAI's `bpe_simple_vocab_16e6.txt` that CLIP uses (MIT license, see
`LICENSE.CLIP`), and `vocab.json` follows from it; `__main__` writes both.
"""

from __future__ import annotations

from pathlib import Path


def config_folder(hub_id: str) -> Path | None:
    """Returns the folder with the configs of the model with this hub id; None if they do not come with the program."""
    root = Path(__file__).parent
    folders = {index.parent.relative_to(root).as_posix(): index.parent for index in root.glob("*/*/model_index.json")}
    return folders.get(hub_id)
