"""Reads YAML that somebody else wrote, such as a recipe: like `trainer.core.documents`, and with a limit on aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trainer.core import documents, errors

MAX_BYTES = documents.MIB
MAX_VALUES = 100_000
"""Values of a YAML document, with each alias counted as often as it is used."""


def read_yaml(path: Path) -> Any:
    """Returns the value in a YAML file, see `parse_yaml`.

    Raises errors.StorageError if it cannot be read, errors.DataError if it is not such a file.
    """
    data = documents.read_bytes(path, MAX_BYTES)
    try:
        return parse_yaml(data)
    except ValueError as error:
        raise errors.DataError(f"{path} is not valid YAML: {error}. Restore it, or move it away.") from None


# The loader that is written in C is ten times as fast, but PyYAML does not have it everywhere.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_KEPT_TAGS = (f"{_TAG}null", f"{_TAG}merge")
_ALLOWED_TAGS = (None, "!", *(f"{_TAG}{name}" for name in ("null", "str", "seq", "map")))


class _TextLoader(_Loader):
    """Keeps the characters of every scalar except null, and refuses a key that occurs twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _KEPT_TAGS[1]]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r:.80} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT_TAGS]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(data: bytes | str) -> Any:
    """Returns the value of a YAML document with settings: null, text, lists and mappings; None if it is empty.

    What looks like a number, a date or a boolean is text with the characters in the file, because 1.10 may be a name:
    only the type of a setting says what it is.

    Raises ValueError if it is no YAML, is nested too deeply, or grows too large once its aliases are replaced.
    """
    text = data if isinstance(data, str) else documents.decode(data)
    try:
        _check_events(text)
        return yaml.load(text, _TextLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem or error.context}{place}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _check_events(text: str) -> None:
    """Raises ValueError if a YAML document is too large. Builds no values, so this takes little time and memory."""
    sizes: dict[str, int] = {}
    # The anchor of each collection that is open, and the number of values in it so far.
    open_collections: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, _Loader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        anchor, size = getattr(event, "anchor", None), 1
        if (tag := getattr(event, "tag", None)) not in _ALLOWED_TAGS:
            raise ValueError(f"the tag {tag} cannot be used here (line {line})")
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((anchor, 1))
            if len(open_collections) > documents.MAX_DEPTH:
                raise ValueError(f"it is nested too deeply (line {line})")
            continue
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise ValueError(f"the alias *{anchor} has no value before it (line {line})")
            size = sizes[anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_collections.pop()
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if anchor is not None:
            sizes[anchor] = size
        outer, sum_of_sizes = open_collections[-1]
        open_collections[-1] = outer, sum_of_sizes + size
        if sum_of_sizes + size > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES} values (line {line})")
