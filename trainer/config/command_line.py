"""Parses the command line, and refuses what must not reach Hydra.

Hydra loads objects by name (`_target_`, `hydra.callbacks`), imports modules (`hydra.searchpath=[pkg://...]`) and writes
files (`hydra.run.dir`) before any rule of this program is checked. Hence overrides are checked as text first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from hydra._internal.utils import get_args_parser  # Hydra offers no public access to its parser.
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString
from hydra.errors import HydraException

from trainer.config.groups import GROUPS, has_folder, option_names
from trainer.config.schema import is_group
from trainer.config.sections import Stage
from trainer.config.typed_text import keep_text
from trainer.core import redaction
from trainer.core.errors import UsageError

if TYPE_CHECKING:
    from argparse import Namespace

    from hydra.core.override_parser.types import Override

ALLOWED_HYDRA_OVERRIDE = re.compile(
    r"hydra/(launcher|sweeper)=\w+|hydra\.(launcher|sweeper|sweep)\.[\w.]+=[^{$]*|hydra\.mode=\w+"
)
"""The settings of Hydra itself that may be typed: those of sweeps."""
HYDRA_COUNTS = ("hydra.launcher.slots", "hydra.sweeper.max_batch_size")
"""Those of them that are whole numbers above 0, which Hydra does not check."""


def parse(arguments: Sequence[str]) -> Namespace:
    """Returns the parsed command line, with `flags` and `overrides`. Raises errors.UsageError."""
    if any(redaction.contains_secret(argument) for argument in arguments):
        # The message does not repeat the argument: it would end up in logs as well.
        raise UsageError(
            "An argument contains an access token or a password. Command lines end up in logs and process lists: "
            "leave it out and set it in the environment, such as HF_TOKEN."
        )

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message[0].upper()}{message[1:]}; --help shows what can be typed.")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(arguments)
    _check_flags(args)
    args.flags = _hydra_flags(args)
    if args.shell_completion:
        if len(args.overrides) != 1 or not re.fullmatch(
            r"(install|uninstall|query)=(bash|fish|zsh)", args.overrides[0]
        ):
            raise UsageError("--shell-completion takes install=bash (or uninstall, fish, zsh).")
        return args
    overrides = [check_override(text, sweep=args.multirun) for text in args.overrides]
    # Hydra does not accept null for a group, even if it is the default in config.yaml.
    args.overrides = [text for text in overrides if not (text.endswith("=null") and is_group(text.partition("=")[0]))]
    return args


def _check_flags(args: Namespace) -> None:
    if args.experimental_rerun is not None:
        raise UsageError(
            "--experimental-rerun would execute the contents of a pickle; type the run's own command again to continue "
            "it."
        )
    if args.config_path is not None or args.config_name is not None:
        raise UsageError(
            "--config-path and --config-name would replace the program's own settings; to add to them, create "
            "FOLDER/experiment/NAME.yaml and type --config-dir FOLDER experiment=NAME."
        )
    if args.config_dir is not None:
        args.config_dir = os.path.expanduser(args.config_dir)
    if args.config_dir is not None and not os.path.isdir(args.config_dir):
        raise UsageError(f"--config-dir {args.config_dir}: there is no such folder.")
    if sum(map(bool, (args.run, args.multirun, args.cfg, args.info, args.shell_completion))) > 1:
        raise UsageError("Type only one of --run, --multirun, --cfg, --info and --shell-completion.")
    if args.resolve and not (args.cfg or args.help):
        raise UsageError("--resolve needs --cfg job; type --cfg job --resolve.")


def _hydra_flags(args: Namespace) -> list[str]:
    """Returns the flags that Hydra gets. --config-dir is not one of them: see `trainer.config.compose.search_path`."""
    names = ("hydra_help", "resolve", "run", "multirun", "shell_completion")
    flags = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    values = {name: getattr(args, name) for name in ("cfg", "package", "info")}
    return [*flags, *(f"--{name}={value}" for name, value in values.items() if value is not None)]


def check_override(text: str, sweep: bool) -> str:
    """Returns an override in a form that Hydra can parse: its value is quoted if necessary.

    Raises errors.UsageError if the override cannot be parsed, changes settings of Hydra itself, or refers to a file.
    """
    key, _, value = text.lstrip("+~").partition("=")
    if text == "ui" or text in Stage.__members__:
        command = "ui ..." if text == "ui" else f"stage={text} ..."
        raise UsageError(f"{text}: type python -m trainer {command}")
    if "_target_" in text:
        raise UsageError(f"{key}: the command line cannot load objects by name; leave out the part with _target_.")
    if "hydra" in key and not ALLOWED_HYDRA_OVERRIDE.fullmatch(text.lstrip("+")):
        raise UsageError(
            f"{key}: settings of Hydra itself cannot be changed; results go to out=FOLDER, and your own yaml files to "
            "--config-dir."
        )
    if key.startswith("hydra."):
        _check_hydra_setting(text, key, value)
    if "@" in key:
        raise UsageError(f"{text}: a group cannot be moved; type {key.partition('@')[0]}={value}.")
    if key == "schema" or ("/" in key and "hydra" not in key):
        raise UsageError(f"{key}: there is no such group; --help lists them.")
    if is_group(key):
        _check_option(text, key, value)
    if text.startswith("~"):
        raise UsageError(f"{text}: settings cannot be removed; leave it out, or type {key}=null.")
    text, override = _parse_override(text, key, value)
    if is_group(key) and has_folder(key):
        _check_option_names(text, key, override.value())
    if key == "run" and (isinstance(override.value(), list) or (override.is_sweep_override() and not sweep)):
        first, *others = (name.strip(" '\"") for name in value.strip("[]").split(","))
        raise UsageError(
            f"{text}: run names one run; to compare it with others, type stage=evaluate run={first} "
            f"'evaluation.against=[{','.join(others) or 'base'}]'"
        )
    if override.is_sweep_override() and not sweep:
        raise UsageError(
            f"{text}: several values are a sweep; type --multirun as well (on the command line only), or "
            f"{key}=[{value}] for a list."
        )
    return keep_text(text)


def _check_hydra_setting(text: str, key: str, value: str) -> None:
    """Checks a setting of Hydra itself that may be typed."""
    if key.startswith("hydra.sweeper.params."):
        raise UsageError(
            f"{text}: type the values of a sweep as settings of their own, such as --multirun optimizer.lr=1e-4,1e-3."
        )
    if key in HYDRA_COUNTS and not re.fullmatch(r"0*[1-9]\d*", value):
        raise UsageError(f"{text}: type a whole number above 0, such as {key}=2.")


def check_is_sweep(overrides: Sequence[str]) -> None:
    """Refuses overrides that have no effect on a single run. Raises errors.UsageError."""
    for text in overrides:
        key = text.lstrip("+").partition("=")[0]
        if re.match(r"hydra[./](launcher|sweeper|sweep)\b", key):
            raise UsageError(f"{text}: this is a setting of a sweep; type --multirun as well, or leave it out.")


def _check_option(text: str, group: str, value: str) -> None:
    """Checks an override that selects an option of a group."""
    if group in GROUPS and (value in ("", "null") or value.startswith("[") or text.startswith("~")):
        raise UsageError(
            f"{text}: a run has one {group}; type {group}=OPTION, one of {', '.join(option_names(group))}."
        )
    # `experiment` and Hydra's own groups may contain slashes.
    path = r"\.\.|\$|\\|(?<![\w-])[/~]" + ("|/" if group in GROUPS else "")
    if re.search(path, value):
        remedy = (
            f"type {group}.path={value}"
            if group in ("model", "dataset")
            else "for your own yaml files see --config-dir in --help"
        )
        raise UsageError(f"{text}: an option is a name, not a path; {remedy}.")
    if text.startswith("+") and has_folder(group):
        raise UsageError(f"{text}: type it without +.")


def _check_option_names(text: str, group: str, value: object) -> None:
    """Refuses numbers, null and mappings in place of names, for which Hydra has no message. `value` is parsed."""
    if value is None or isinstance(value, Glob) or (group in GROUPS and isinstance(value, dict)):
        # Hydra merges a dictionary into the settings of the group.
        return
    takes_list = group not in GROUPS and "/" not in group
    for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
        names = choice if takes_list and isinstance(choice, list) else [choice]
        if not all(isinstance(name, str | QuotedString) for name in names):
            several = f", {group}=[A,B] for several, or {group}=[] for none" if takes_list else ""
            raise UsageError(f"{text}: an option is a name, see --help; type {group}=NAME{several}.")


def _parse_override(text: str, key: str, value: str) -> tuple[str, Override]:
    """Returns the override, quoted if necessary, and its parsed form."""
    parser = OverridesParser.create()
    try:
        return text, parser.parse_override(text if key else "")
    except (HydraException, RecursionError) as error:
        # Hydra's grammar needs quotes around ~, umlauts and a second =, even if the value is unambiguous.
        prefix = "+" * (len(text) - len(text.lstrip("+")))
        quoted = f"{prefix}{key}='{value}'"
        try:
            if "=" not in text or not key or re.search(r"""[][{}'"\\$,]""", value):
                raise error
            text.encode()
            return quoted, parser.parse_override(quoted)
        except (HydraException, RecursionError, UnicodeEncodeError):
            raise UsageError(
                f"{text:.200}: this cannot be parsed; type group=option or key=value. A value with commas, quotes or "
                """brackets needs two pairs of quotes: 'name="a, b"'."""
            ) from None


def to_override(key: str, value: str | Sequence[str]) -> str:
    """Returns the override that sets a text, or a list of texts, to exactly these characters."""
    # In OmegaConf's grammar, ${ starts an interpolation.
    texts = [quote(text.replace("${", "\\${")) for text in ([value] if isinstance(value, str) else value)]
    return f"{key}={texts[0]}" if isinstance(value, str) else f"{key}=[{','.join(texts)}]"


def quote(text: str) -> str:
    """Returns text as a quoted string of Hydra's grammar, in which a backslash is special only before a quote."""
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ("\\" + found[2] if found[2] else ""), text)
    return f'"{escaped}"'


def is_safe_to_complete(line: str) -> bool:
    """Returns whether Hydra may compose this unfinished command line in order to complete it."""
    try:
        for text in line.split(" ")[1:-1]:
            if text and not text.startswith("-"):
                check_override(text, sweep=True)
    except UsageError:
        return False
    return True
