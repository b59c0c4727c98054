"""Writes the files of CLIP's tokenizer: `python -m trainer.model.published bpe_simple_vocab_16e6.txt.gz FOLDER...`.

The file is `clip/bpe_simple_vocab_16e6.txt.gz` of github.com/openai/CLIP, sha256
924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

SIZE = 49408
"""Tokens of CLIP: bytes, bytes at the end of a word, merges, and the marks of the start and the end of a text."""
MARKS = ("<|startoftext|>", "<|endoftext|>")


def main() -> None:
    parser = argparse.ArgumentParser(description="write the vocab.json and merges.txt of CLIP's tokenizer")
    parser.add_argument("file", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    lines = gzip.decompress(arguments.file.read_bytes()).decode().splitlines()
    # The first line is a comment. The file has more merges than CLIP uses.
    merges = lines[1 : 1 + SIZE - 2 * 256 - len(MARKS)]
    vocabulary = json.dumps(clip_vocabulary(merges), ensure_ascii=False, separators=(",", ":"))
    for folder in arguments.folders:
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        (folder / "vocab.json").write_text(f"{vocabulary}\n", encoding="utf-8")


def clip_vocabulary(merges: Iterable[str]) -> dict[str, int]:
    """Returns token -> id. `merges` are pairs of tokens with a space between them, in the order of their ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # Each byte that is not printable is written as one of the characters after the first 256.
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    ends = [f"{character}</w>" for character in characters]
    tokens = [*characters, *ends, *(merge.replace(" ", "") for merge in merges), *MARKS]
    return {token: number for number, token in enumerate(tokens)}


if __name__ == "__main__":
    main()
