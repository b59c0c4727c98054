"""Properties of settings that their type does not show: paths, and settings that were added after runs exist."""

from __future__ import annotations

from dataclasses import MISSING, Field, field
from typing import Any

_ADDED, _PATH = "added", "path"


def added(default: Any = MISSING, *, default_factory: Any = MISSING, path: bool = False) -> Any:
    """Returns a dataclass field for a setting that decides the weights and whose default changes nothing.

    At its default it is not part of a run's identity, so the identities of earlier runs stay the same. For `path` see
    `path_setting`.
    """
    metadata = {_ADDED: True, _PATH: path}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def is_added_default(setting: Field[Any], value: Any) -> bool:
    """Returns whether `setting` was declared with `added` and `value` is its default."""
    if not setting.metadata.get(_ADDED):
        return False
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    return bool(value == default)


def path_setting(default: Any = MISSING) -> Any:
    """Returns a dataclass field for a setting that may be a path, or a list of paths, which may begin with ~."""
    return field(default=default, metadata={_PATH: True})


def is_path(setting: Field[Any]) -> bool:
    """Returns whether `setting` was declared with `path_setting`."""
    return bool(setting.metadata.get(_PATH))
