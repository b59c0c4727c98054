"""Turns errors of Hydra and OmegaConf into a UsageError whose message is one line."""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import TYPE_CHECKING

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from trainer.config.compose import compose_config
from trainer.config.fields import expected_value
from trainer.config.groups import GROUPS, has_folder, option_names
from trainer.config.schema import is_group
from trainer.config.suggestions import all_keys, explain_unknown_key
from trainer.core.errors import UsageError

if TYPE_CHECKING:
    from argparse import Namespace

TYPE_ERROR = re.compile(
    "could not be converted|not a valid|not Optional|not a subclass|annot merge|[Ii]nvalid (value|type)"
)
"""What OmegaConf says about a value of the wrong type, where Hydra keeps only the text of its error."""


@contextmanager
def usage_errors(args: Namespace) -> Iterator[None]:
    """Raises errors of Hydra and OmegaConf inside the block as errors.UsageError; `args` is the parsed command line."""
    try:
        yield
    except YAMLError as error:
        raise UsageError(f"A settings file is not valid YAML: {' '.join(str(error).split())}.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error, args)) from error
    except (AssertionError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        # Hydra checks the form of a defaults list and of its own settings only here and there.
        if not _raised_by_hydra(error) or (isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG):
            raise
        raise UsageError(_explain_other(error, args)) from error


def _raised_by_hydra(error: Exception) -> bool:
    """Whether Hydra or OmegaConf raised this error, themselves or in a library that they called."""
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    known = [package for package in packages if package in ("hydra", "omegaconf", "trainer", "hydra_plugins")]
    return known[-1:] in (["hydra"], ["omegaconf"])


def _explain_other(error: Exception, args: Namespace) -> str:
    """Returns a message about settings whose form is so wrong that Hydra does not report it properly."""
    selected = " ".join(text for text in args.overrides if is_group(text.lstrip("+").partition("=")[0]))
    where = f"A settings file that {selected} selects" if selected else "A settings file or an argument"
    if isinstance(error, RecursionError):
        return f"{where} names itself in its defaults list, directly or through other files, or is nested too deeply."
    if isinstance(error, OSError):
        return f"{where} names a group or an option with more characters than a file name may have."
    if isinstance(error, UnicodeDecodeError):
        return f"{where} is not UTF-8 text ({error})."
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{where} has a form that Hydra cannot compose ({reason})."


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
    if (
        key
        and (isinstance(cause, ValidationError) or TYPE_ERROR.search(str(cause)))
        and (values := expected_value(key))
    ):
        values = "a value, not null" if "not Optional" in str(cause) else values
        override = found[1] if (found := re.match(r"Error merging override (.*)", text)) else None
        if override and override.lstrip("+").startswith(f"{key}="):
            return f"{override}: type {values}."
        return f"{prefix or (f'{override}: ' if override else '')}{key} takes {values}."
    if isinstance(error, InstantiationException) and error.__cause__:
        # Its own text says which class was called.
        return f"{key}: {' '.join(str(error.__cause__).split())}."
    if key and "annot merge" in str(cause):
        return (
            f"{prefix}{key} has a list or names with values already, for example from a recipe; type {key}=null before "
            "the new value."
        )
    if key:
        reason = str(cause).splitlines()[-1 if cause is error and file else 0].strip().rstrip(".")
        return f"{prefix}{key}: {reason}."
    return " ".join(text.split()) or _explain_other(error, args)


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
        if (groups is None or key in groups) and has_folder(key) and not re.search(r"[,{]", option)
    ]
