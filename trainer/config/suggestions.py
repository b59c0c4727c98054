"""What to say about a setting that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf


def all_keys(config: DictConfig) -> list[str]:
    """Returns every dotted key of a composed configuration."""
    return [key for key, _ in _walk(config)]


def unknown_keys(config: DictConfig) -> list[str]:
    """Returns the keys that are not fields of the settings class that they were added to.

    `+key=value` adds a key without asking the schema.
    """
    return [key for key, known in _walk(config) if not known]


def _walk(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yields each dotted key, and whether its settings class has such a field."""
    settings = OmegaConf.get_type(node)
    known = {f.name for f in fields(settings)} if settings and is_dataclass(settings) else set(node)
    # The keys of a dictionary may be numbers: `dataset.resolution={512: 1, 1024: 3}`.
    names: list[Any] = list(node)
    for name in names:
        yield f"{prefix}{name}", name in known
        if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            value = node[name]
            if isinstance(value, DictConfig):
                yield from _walk(value, f"{prefix}{name}.")


def explain_unknown_key(key: str, known: Sequence[str]) -> str:
    """Returns a message about a key that does not exist.

    It names the keys that end in the same name, else the most similar ones, else the keys of the same group.
    """
    known = [name for name in known if ".suggested." not in name and not key.startswith(f"{name}.")]
    group = key.partition(".")[0]
    if key in known:
        return (
            f"{key}: the selected {group} has no such setting; type another {group}=OPTION, or leave out either the "
            "setting or the option"
        )
    message = f"{key}: there is no such setting"
    if similar := _similar(key, known):
        return f"{message}; did you mean {' or '.join(similar[:3])}?"
    if in_group := [name.partition(".")[2] for name in known if name.startswith(f"{group}.")]:
        return f"{message}; here {group} has only {', '.join(in_group)}."
    return f"{message}; --cfg job lists all."


def _similar(key: str, known: Sequence[str]) -> list[str]:
    last = key.rpartition(".")[2]
    last_of = {name: name.rpartition(".")[2] for name in known}
    same = [
        name for name in known if last in (last_of[name], _initials(last_of[name])) or last_of[name] == _initials(last)
    ]
    if same := same or difflib.get_close_matches(key, known, 1, 0.75):
        return same
    nearest = difflib.get_close_matches(last, last_of.values(), 1, 0.65)
    return [name for name in known if last_of[name] in nearest]


def _initials(name: str) -> str | None:
    """Returns the initials of a name of several words (learning_rate -> lr), else None."""
    return "".join(word[0] for word in name.split("_") if word) if "_" in name else None
