"""Turns errors of Hydra and OmegaConf into a UsageError whose message is one line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from trainer.config.compose import compose_config
from trainer.config.groups import CONF, GROUPS, option_names
from trainer.config.suggestions import all_keys, expected_type, explain_unknown_key
from trainer.core.errors import UsageError

if TYPE_CHECKING:
    from argparse import Namespace


@contextmanager
def usage_errors(args: Namespace) -> Iterator[None]:
    """Raises errors of Hydra and OmegaConf inside the block as errors.UsageError; `args` is the parsed command line."""
    try:
        yield
    except YAMLError as error:
        raise UsageError(f"A settings file is not valid YAML: {' '.join(str(error).split())}.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error, args)) from error


def explain(error: HydraException | OmegaConfBaseException, args: Namespace) -> str:
    """Returns a message of one line: the available options, the key that was probably meant, or the accepted values."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_missing_option(error.missing_cfg_file, error.options)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    # The message about an error in a yaml file starts with the file's name.
    file = found[1] if (found := re.match(r"In '([^']+)':", text)) else None
    prefix = f"{file}.yaml: " if file else ""
    key = getattr(cause, "full_key", None) or (found[1] if (found := re.search(r"full_key: (\S+)", text)) else None)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) or re.search(r"Key '[^']+' (is )?not in", text):
        if file and key == file.partition("/")[0] and key not in GROUPS:
            return f"{prefix}its first line must be # @package _global_; otherwise it sets values of {key} only."
        # A faulty file cannot be composed. Its keys are compared with those of the selected options of config groups.
        known = all_keys(compose_config(_selected_options(args, GROUPS if file else None), args.config_dir))
        return prefix + explain_unknown_key(str(key), known)
    if key and (values := expected_type(str(cause))):
        override = found[1] if (found := re.match(r"Error merging override (.*)", text)) else None
        if override and override.lstrip("+").startswith(f"{key}="):
            return f"{override}: type {values}."
        return f"{prefix or (f'{override}: ' if override else '')}{key} takes {values}."
    if key:
        reason = str(cause).splitlines()[-1 if cause is error and file else 0].strip().rstrip(".")
        return f"{prefix}{key}: {reason}."
    return " ".join(text.split())


def _explain_missing_option(path: str, options: Collection[str] | None) -> str:
    """`path` is <group>/<option>. Groups of Hydra itself and options of `experiment` may contain further slashes."""
    group, _, option = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
    return f"{group}={option}: there is no such option; type one of {', '.join(options or option_names(group))}."


def _selected_options(args: Namespace, groups: Collection[str] | None) -> list[str]:
    """Returns the overrides that select an option of one of these groups; None: of any group."""
    pairs = (text.lstrip("+").partition("=") for text in args.overrides)
    return [
        f"{key}={option}"
        for key, _, option in pairs
        if (groups is None or key in groups) and (CONF / key).is_dir() and "," not in option
    ]
