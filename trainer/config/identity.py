"""The identity of a run: a hash of the settings that decide its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from trainer.config.groups import OPTION_OF
from trainer.config.schema import DECIDES_WEIGHTS, Run
from trainer.core.settings import is_added_default


def to_plain(value: Any, for_identity: bool = False) -> Any:
    """Returns settings as JSON values. Enums become their names.

    In a group whose options have settings classes of their own, `kind` is the name of the option. `for_identity` leaves
    out the settings that were added later (`trainer.core.settings.added`) and have their default value.
    """
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        values = {
            f.name: to_plain(getattr(value, f.name), for_identity)
            for f in fields(value)
            if not (for_identity and is_added_default(f, getattr(value, f.name)))
        }
        return {"kind": OPTION_OF[type(value)], **values} if type(value) in OPTION_OF else values
    if isinstance(value, dict):
        return {str(key): to_plain(item, for_identity) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, for_identity) for item in value]
    return value


def identity_settings(run: Run) -> dict[str, Any]:
    """Returns the resolved settings that decide the trained weights. They are also the parameters in MLflow.

    Settings that change only the location of the data, the speed or the monitoring are left out.
    """
    everything = to_plain(run, for_identity=True)
    settings = {name: everything[name] for name in DECIDES_WEIGHTS}
    # The suggested values are part of the settings that use them.
    del settings["model"]["suggested"]
    del settings["dataset"]["path"]
    settings["dataset"].get("regularization", {}).pop("path", None)
    # alpha is already resolved from it.
    settings["method"].pop("alpha_per_rank", None)
    return settings


def run_id(run: Run) -> str:
    """Returns the identity of a run, 12 hex digits."""
    return hashlib.sha256(json.dumps(identity_settings(run), sort_keys=True).encode()).hexdigest()[:12]


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as a flat dictionary with dotted keys."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            result |= flatten(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns `key: old -> new` for each dotted key whose value differs."""
    old, new = flatten(old), flatten(new)
    keys = sorted({*old, *new})
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
