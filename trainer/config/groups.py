"""The config groups and their options, derived from the files in `conf/` and `trainer/`.

An option is a yaml file `conf/<group>/<option>.yaml`. Its settings class is the subclass of the group's base class that
the module `trainer/<group>/<option>.py` defines. In a group without such modules (`hardware`, for example), all options
have the group's base class and differ only in their values.
"""

from __future__ import annotations

import importlib
import os
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

# In an installed wheel, conf/ is inside the package; in a checkout, it is beside the package.
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
"""Group -> base class of the settings of its options, in the order of the defaults list in `conf/config.yaml`."""


def has_folder(group: str) -> bool:
    """Returns whether a group has a folder in conf/, for any text that a user may type."""
    # Path.is_dir raises an error for a name that is too long.
    return os.path.isdir(CONF / group)


def option_names(group: str) -> list[str]:
    """Returns the names of a group's options, sorted."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def settings_class(group: str, option: str) -> type | None:
    """Returns the settings class that the module of an option defines; None if the option has no module."""
    name = f"trainer.{group}.{option}"
    spec = find_spec(name)
    if spec is None or spec.submodule_search_locations is not None:
        return None
    members = vars(importlib.import_module(name)).values()
    classes = (c for c in members if isinstance(c, type) and issubclass(c, BASES[group]) and c.__module__ == name)
    return next(classes, None)


def _options(group: str) -> dict[str, type]:
    names = option_names(group)
    own_classes = {name: settings for name in names if (settings := settings_class(group, name)) is not None}
    return own_classes or dict.fromkeys(names, BASES[group])


GROUPS: dict[str, dict[str, type]] = {group: _options(group) for group in BASES}
"""Group -> option -> settings class."""
OPTION_OF: dict[type, str] = {
    settings: option
    for options in GROUPS.values()
    for option, settings in options.items()
    if list(options.values()).count(settings) == 1
}
"""Settings class -> option, for options whose class is not shared with another option."""


def option_name(settings: object) -> str:
    """Returns the name of the option that has this settings class. Raises KeyError if options share the class."""
    return OPTION_OF[type(settings)]


def saved_settings_class(group: str, kind: str) -> type:
    """Returns the settings class of a group in a saved config.yaml, where `kind` is the name of the option.

    `kind` is ignored if the options of the group share a class. Only older files have it in these groups.
    """
    base = BASES[group]
    return base if base in GROUPS[group].values() else GROUPS[group][kind]
