"""The config groups and their options, derived from the files in `conf/` and `trainer/`.

An option is a yaml file `conf/<group>/<option>.yaml`. Its settings class is the one that the module `trainer/<group>/<option>.py` defines;
in a group without such modules (`hardware`, for example) all options share the group's base class and differ by their values alone.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

from trainer.dataset import Dataset
from trainer.evaluation import Evaluation
from trainer.hardware import Hardware
from trainer.lr_scheduler import LRScheduler
from trainer.method import Method
from trainer.model import Family
from trainer.optimizer import Optimizer
from trainer.precision import Precision
from trainer.tracking import Tracking

# Inside the package in an installed wheel, beside it in a checkout.
CONF = next(folder / "conf" for folder in Path(__file__).parents[1:3] if (folder / "conf").is_dir())

BASES: dict[str, type] = {
    "model": Family,
    "method": Method,
    "precision": Precision,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
    "dataset": Dataset,
    "hardware": Hardware,
    "evaluation": Evaluation,
    "tracking": Tracking,
}
"""The settings class that all options of a group extend. The order is that of the defaults list in `conf/config.yaml`."""


def option_names(group: str) -> list[str]:
    """The names of a group's options, sorted."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def settings_class(group: str, option: str) -> type | None:
    """The settings class that the module of an option defines; None if the option has no module of its own."""
    name = f"trainer.{group}.{option}"
    spec = find_spec(name)
    if spec is None or spec.submodule_search_locations is not None:
        return None
    members = vars(importlib.import_module(name)).values()
    classes = (c for c in members if isinstance(c, type) and issubclass(c, BASES[group]) and c.__module__ == name)
    return next(classes, None)


def _options(group: str) -> dict[str, type]:
    package = importlib.import_module(f"trainer.{group}")
    if hasattr(package, "OPTIONS"):  # TODO: remove with the last OPTIONS
        return package.OPTIONS
    names = option_names(group)
    found = {name: kind for name in names if (kind := settings_class(group, name)) is not None}
    return found or dict.fromkeys(names, BASES[group])


GROUPS: dict[str, dict[str, type]] = {group: _options(group) for group in BASES}
"""Group -> option -> settings class."""

OPTION_OF: dict[type, str] = {
    settings: option
    for options in GROUPS.values()
    for option, settings in options.items()
    if list(options.values()).count(settings) == 1
}
"""Settings class -> option, for the options that have a settings class of their own."""


def option_name(settings: object) -> str:
    """Name of the option that has this settings class. Raises KeyError if several options share the class."""
    return OPTION_OF[type(settings)]


def saved_settings_class(group: str, kind: str) -> type:
    """Settings class of a group in a saved config.yaml in which `kind` names the option.

    If the options of a group share a class, their `kind` is ignored. Only older files have one.
    """
    base = BASES[group]
    return base if base in GROUPS[group].values() else GROUPS[group][kind]
