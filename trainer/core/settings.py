"""Settings that are added to a settings class after runs with it exist."""

from __future__ import annotations

from dataclasses import MISSING, Field, field
from typing import Any

_ADDED = "added"


def added(default: Any = MISSING, *, default_factory: Any = MISSING) -> Any:
    """Returns a dataclass field for a setting that decides the weights and whose default changes nothing.

    At its default it is not part of a run's identity, so the identities of earlier runs stay the same.
    """
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata={_ADDED: True})
    return field(default=default, metadata={_ADDED: True})


def is_added_default(setting: Field[Any], value: Any) -> bool:
    """Returns whether `setting` was declared with `added` and `value` is its default."""
    if not setting.metadata.get(_ADDED):
        return False
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    return bool(value == default)
