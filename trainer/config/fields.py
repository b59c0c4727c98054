"""What the settings classes say about a dotted key: whether the setting is text, and whether it is a path."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterator
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from trainer.config.groups import GROUPS
from trainer.config.schema import DATA_FOLDERS, DECIDES_WEIGHTS, Run
from trainer.core.errors import UsageError
from trainer.core.settings import is_path


def is_text(key: str) -> bool:
    """Returns whether the setting with this dotted key is text, or holds text in lists or dictionaries.

    True if it is text in one option of a group: OmegaConf converts text to the type of a setting, but a number that
    became text has lost the characters that were typed.
    """
    return any(_is_text(hint) for hint in _hints(key))


def _is_text(hint: Any) -> bool:
    if get_origin(hint) is dict:
        return _is_text(get_args(hint)[1])
    return hint is str or any(_is_text(argument) for argument in get_args(hint))


def _hints(key: str) -> list[Any]:
    """Returns the type of a setting in each option that has it."""
    name, *rest = key.split(".")
    found: list[Any] = list(GROUPS[name].values()) if name in GROUPS else [_types(Run).get(name)]
    for part in rest:
        found = [_type_inside(outer, part) for outer in found]
    return [hint for hint in found if hint is not None]


def _type_inside(outer: Any, name: str) -> Any:
    if is_dataclass(outer):
        return _types(cast(type, outer)).get(name)
    return get_args(outer)[1] if get_origin(outer) is dict else None


@cache
def _types(settings: Hashable) -> dict[str, Any]:
    return get_type_hints(settings)


def expected_value(key: str) -> str | None:
    """Returns which values the setting with this dotted key takes; None if there is no such setting, or any value.

    The key may end in the index of a list, such as `optimizer.betas[1]`.
    """
    name, is_item, _ = key.partition("[")
    hints = _hints(name)
    if is_item:
        lists = [part for hint in hints for part in (hint, *get_args(hint)) if get_origin(part) is list]
        hints = [get_args(part)[0] for part in lists]
    described = [text for hint in hints if (text := _describe(hint))]
    return " or ".join(dict.fromkeys(described)) or None


def _describe(hint: Any) -> str | None:
    """Returns which values a type accepts, without null."""
    if isinstance(hint, UnionType):
        return next((text for argument in get_args(hint) if (text := _describe(argument))), None)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(member.name for member in hint)}"
    if is_dataclass(hint):
        return "one of the settings in it, as group.key=value"
    return _VALUES.get(get_origin(hint) or hint)


_VALUES = {
    int: "a whole number",
    float: "a number such as 0.1 or 1e-4",
    bool: "true or false",
    str: "text",
    list: "a list such as [a,b]",
    dict: "names with values such as {a: 1, b: 2}",
}


def convert_untyped(config: DictConfig) -> None:
    """Replaces text by numbers and booleans, as YAML reads them, where a settings class declares no type but Any."""
    for key, node, field in _walk(config):
        hint = _types(_settings_class(node))[field.name]
        if Any in (hint, *get_args(hint)) and not OmegaConf.is_interpolation(node, field.name):
            value = node[field.name]
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            OmegaConf.update(config, key, to_scalars(plain), merge=False)


def to_scalars(value: Any) -> Any:
    """Returns a value in which text that YAML reads as a number or a boolean is that number or boolean."""
    if isinstance(value, dict):
        return {key: to_scalars(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_scalars(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        return int(value)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", value):
        return float(value)
    return {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}.get(value.lower(), value)


def expanded_paths(config: DictConfig) -> dict[str, str | list[str]]:
    """Returns the settings that are paths below a home folder, such as ~/runs, with that folder in place of ~.

    Settings that are part of a run's identity are left out: they stay as typed, so that a run has the same identity on
    every machine, and are expanded where they are used. Raises errors.UsageError if there is no such home folder.
    """
    expanded: dict[str, str | list[str]] = {}
    for key, node, field in _walk(config):
        if not is_path(field):
            continue
        value = node[field.name]
        texts = list(value) if OmegaConf.is_config(value) else [value]
        results = [_expand(key, text) if isinstance(text, str) else text for text in texts]
        if results != texts and (key.partition(".")[0] not in DECIDES_WEIGHTS or key in DATA_FOLDERS):
            expanded[key] = results if OmegaConf.is_config(value) else results[0]
    return expanded


def _expand(key: str, text: str) -> str:
    found = re.fullmatch(r"(sqlite:///|file:///?)?(~.*)", text, re.DOTALL)
    if found is None:
        return text
    path = os.path.expanduser(found[2])
    if path.startswith("~"):
        user = found[2].partition("/")[0]
        raise UsageError(
            f"{key}={text}: there is no home folder of a user {user[1:]}; type the whole path, or ./{found[2]} for a "
            "name that begins with ~"
        )
    return (found[1] or "") + path


def _walk(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig, Field[Any]]]:
    """Yields the dotted key of each field of a settings class, the node that has it, and the field."""
    for field in fields(_settings_class(node)):
        if field.name not in node or OmegaConf.is_missing(node, field.name):
            continue
        yield f"{prefix}{field.name}", node, field
        if not OmegaConf.is_interpolation(node, field.name):
            child = node[field.name]
            if isinstance(child, DictConfig) and is_dataclass(_settings_class(child)):
                yield from _walk(child, f"{prefix}{field.name}.")


def _settings_class(node: DictConfig) -> Any:
    return OmegaConf.get_type(node)
