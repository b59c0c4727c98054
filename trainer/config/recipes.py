"""Reads the user's yaml files (--config-dir), which may come from somebody else, before Hydra acts on them.

Hydra loads objects that a file names by `_target_`, or as a callback, a log handler, a launcher or a sweeper. A file
may only choose a launcher and a sweeper of this program or of Hydra, and set what their sweep needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.plugins.config_source import ConfigSource
from omegaconf import DictConfig, OmegaConf

from trainer.config.command_line import check_override
from trainer.config.fields import to_scalars
from trainer.core import documents, yaml_documents
from trainer.core.errors import DataError, UsageError

SWEEP_SETTING = re.compile(r"mode|(launcher|sweeper|sweep)\.[\w.]+")
"""The settings of Hydra that a file may contain: those of sweeps."""
SWEEP_OPTION = re.compile(r"override /?hydra/(launcher|sweeper)")
"""The groups of Hydra from which the defaults list of a file may select an option."""
PLUGINS = re.compile(
    r"hydra_plugins\.trainer_\w+\.\w+|hydra\._internal\.core_plugins\.basic_(launcher\.BasicLauncher|sweeper\.BasicSweeper)"
)
"""The launchers and sweepers that may run."""


def read_recipe(path: Path) -> tuple[dict[str, str | None], dict[str, Any]]:
    """Returns the header of a settings file, as Hydra reads it, and its values, see `yaml_documents.parse_yaml`.

    Raises errors.UsageError, errors.StorageError if it cannot be read.
    """
    try:
        text = documents.decode(documents.read_bytes(path, yaml_documents.MAX_BYTES))
        values = yaml_documents.parse_yaml(text)
        header = ConfigSource._get_header_dict(text[:512])
    except (DataError, ValueError) as error:
        prefix = "" if isinstance(error, DataError) else f"{path} is not a valid settings file: "
        raise UsageError(f"{prefix}{error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold settings, each as a line with key: value.")
    _check_keys(values, path)
    package = header.get("package") or ""
    if "hydra" in package:
        raise UsageError(f"{path}: its first line makes it a part of Hydra's own settings; type # @package _global_.")
    _check_defaults(values.get("defaults"), path)
    if "hydra" in values:
        values["hydra"] = _checked_hydra(values["hydra"], path)
    return header, values


def _check_keys(value: Any, path: Path) -> None:
    """Refuses objects loaded by name, and keys that are not text."""
    for key, item in _pairs(value):
        if re.search(r"(^|\.)null$", key):
            raise UsageError(f"{path}: the key {key} is null; type the name of a setting.")
        if "_target_" in key:
            raise UsageError(f"{path}: a settings file cannot load objects by name; remove _target_.")
        if isinstance(item, str) and "_target_" in item:
            raise UsageError(f"{path}: {key} cannot load objects by name; remove _target_.")


def _pairs(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each value that is inside another, with its dotted key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        dotted = f"{prefix}{'null' if key is None else key}"
        yield dotted, item
        yield from _pairs(item, f"{dotted}.")


def _check_defaults(defaults: Any, path: Path) -> None:
    """Refuses a defaults list that selects parts of Hydra's own settings, or puts options there."""
    for entry in defaults if isinstance(defaults, list) else ():
        for group, option in entry.items() if isinstance(entry, dict) else ((str(entry), None),):
            group = str(group).removeprefix("optional ")
            if SWEEP_OPTION.fullmatch(group) and isinstance(option, str) and re.fullmatch(r"\w+", option):
                continue
            if "hydra" in group or "$" in group:
                raise UsageError(
                    f"{path}: its defaults list contains {group}, but a settings file may select only the launcher and "
                    "the sweeper of Hydra's own settings, as in override hydra/launcher: processes."
                )


def _checked_hydra(values: Any, path: Path) -> dict[str, Any]:
    """Returns the settings of Hydra itself in a file. Raises errors.UsageError unless they are those of a sweep."""
    for key, value in _pairs(values):
        known = SWEEP_SETTING.fullmatch(key) or (isinstance(value, dict) and key in ("launcher", "sweeper", "sweep"))
        if not known and not key.startswith("sweeper.params."):
            raise UsageError(
                f"{path}: hydra.{key}: settings of Hydra itself cannot be changed, except those of sweeps (hydra.mode, "
                "hydra.sweeper, hydra.launcher, hydra.sweep)."
            )
        if isinstance(value, str) and "${" in value and not key.startswith("sweep."):
            raise UsageError(f"{path}: hydra.{key}={value} must be a value, without ${{...}}.")
    if not isinstance(values, dict):
        raise UsageError(f"{path}: hydra must hold settings of a sweep, such as mode: MULTIRUN.")
    sweeper = values.get("sweeper")
    params = sweeper.get("params") if isinstance(sweeper, dict) else None
    result = to_scalars(values)
    if params is not None:
        if not isinstance(params, dict):
            raise UsageError(f"{path}: hydra.sweeper.params must hold settings, such as optimizer.lr: 1e-4,1e-3.")
        result["sweeper"]["params"] = dict(_checked_param(key, value, path) for key, value in params.items())
    return result


def _checked_param(key: Any, value: Any, path: Path) -> tuple[str, str]:
    """Returns the values of a setting in a sweep as Hydra's sweeper takes them. Raises errors.UsageError."""
    if isinstance(value, dict | list) or value is None:
        raise UsageError(f"{path}: hydra.sweeper.params: type the values of {key} as text, such as {key}: 1,2,3.")
    try:
        if "hydra" in str(key):
            raise UsageError(f"{key}: settings of Hydra itself cannot be changed.")
        name, _, checked = check_override(f"{key}={value}", sweep=True).partition("=")
        return name, checked
    except UsageError as error:
        raise UsageError(f"{path}: hydra.sweeper.params: {error}") from None


def check_hydra(config: DictConfig) -> None:
    """Raises errors.UsageError if the composed settings of Hydra would make it load, run or write anything else.

    `read_recipe` refuses such files; this does not depend on where the settings come from.
    """
    node = OmegaConf.to_container(config.hydra, resolve=False)
    assert isinstance(node, dict)
    fixed = {
        "callbacks": (node["callbacks"], {}),
        "run.dir": (node["run"]["dir"], "."),
        "output_subdir": (node["output_subdir"], None),
        "job.chdir": (node["job"]["chdir"], False),
        "job.env_set": (node["job"]["env_set"], {}),
        "job.env_copy": (node["job"]["env_copy"], []),
    }
    fixed |= {
        f"{name}.{key}": (value, None)
        for name in ("job_logging", "hydra_logging")
        for key, value in (node[name] or {}).items()
        if key not in ("version", "root", "disable_existing_loggers")
    }
    for key, (value, expected) in fixed.items():
        if value != expected:
            raise UsageError(f"hydra.{key}={value}: settings of Hydra itself cannot be changed; leave it out.")
    for name in ("launcher", "sweeper"):
        plugin = node[name] if isinstance(node[name], dict) else {}
        target = plugin.pop("_target_", None)
        if not PLUGINS.fullmatch(str(target)) or "_target_" in str(plugin) or "${" in str(plugin):
            raise UsageError(f"hydra/{name}: there is no {name} {target}; type hydra/{name}=OPTION of this program.")
