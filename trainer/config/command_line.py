"""The command line as it is typed: what is refused before Hydra sees it, what is said of what Hydra refuses, and the text of --help."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from trainer import config
from trainer.config.groups import CONF
from trainer.core import redaction
from trainer.core.errors import UsageError

if TYPE_CHECKING:
    from argparse import Namespace


MANUAL = """\
Fine-tune an image model, and watch it learn.

  python -m trainer                     train the model that comes with the program, on pictures that it draws itself
  python -m trainer stage=check         what would be trained, without training
  python -m trainer dataset=pairs dataset.path=FOLDER method.rank=8 optimizer.lr=1e-3
  python -m trainer stage=sample run=ID pictures of a run that is there

The same command continues a run that was stopped, and says so of one that is finished.
More: --cfg job prints the settings alone; --multirun runs each of key=a,b; --config-dir FOLDER adds FOLDER/experiment/NAME.yaml
as experiment=NAME; eval "$(trainer -sc install=bash)" completes with the tab key.

Groups (group=option):
{groups}

Settings (key=value), as this command line sets them; null is decided by the program:
{settings}"""

SWEEPS = re.compile(r"hydra/(launcher|sweeper)=\w+|hydra\.(launcher|sweeper|sweep)\.[\w.]+=[^{$]*|hydra\.mode=\w+")
"""All of Hydra's own that may be typed. What it loads by name (`hydra.callbacks`), imports (`hydra.searchpath=[pkg://...]`) or
writes (`hydra.run.dir`) happens before any rule of ours is asked."""


def read(arguments: Sequence[str]) -> Namespace:
    """The command line in its parts, `flags` and `overrides` among them, with what must not reach Hydra refused. Raises errors.UsageError."""
    if any(redaction.contains_secret(argument) for argument in arguments):
        # Which one is not said: this line would end up in logs as well.
        raise UsageError(
            "An argument holds an access token or a password. Command lines end up in logs and process lists: "
            "leave it out and set it in the environment, such as HF_TOKEN."
        )

    def refuse(message: str) -> None:
        raise UsageError(f"{message[0].upper()}{message[1:]}; --help shows what can be typed.")

    parser = get_args_parser()
    parser.error = refuse
    asked = parser.parse_intermixed_args(arguments)
    asked.flags = [argument for argument in arguments if argument not in asked.overrides]
    if asked.experimental_rerun is not None:
        raise UsageError(
            "--experimental-rerun would execute what a pickle holds; type the run's own command again to continue it."
        )
    if asked.config_path is not None or asked.config_name is not None:
        raise UsageError(
            "--config-path and --config-name would leave out the program's own settings; to add to them, "
            "make FOLDER/experiment/NAME.yaml and type --config-dir FOLDER experiment=NAME."
        )
    if asked.config_dir is not None and not Path(asked.config_dir).is_dir():
        raise UsageError(f"--config-dir {asked.config_dir}: there is no such folder.")
    if sum(map(bool, (asked.run, asked.multirun, asked.cfg, asked.info, asked.shell_completion))) > 1:
        raise UsageError("Type only one of --run, --multirun, --cfg, --info and --shell-completion.")
    if asked.resolve and not (asked.cfg or asked.help):
        raise UsageError("--resolve goes with --cfg job; type --cfg job --resolve.")
    if asked.shell_completion:
        if len(asked.overrides) != 1 or not re.fullmatch(
            r"(install|uninstall|query)=(bash|fish|zsh)", asked.overrides[0]
        ):
            raise UsageError("--shell-completion takes install=bash (or uninstall, fish, zsh).")
        return asked
    asked.overrides = [guard(text, sweep=asked.multirun) for text in asked.overrides]
    # Hydra knows no null for a group, though it may be what the yaml says.
    asked.overrides = [
        text for text in asked.overrides if not (text.endswith("=null") and config.is_group(text.partition("=")[0]))
    ]
    return asked


def guard(text: str, sweep: bool) -> str:
    """An override as Hydra reads it. Raises errors.UsageError for one that reaches for Hydra's own settings or for a file elsewhere, or that
    cannot be read."""
    key, equals, value = text.lstrip("+~").partition("=")
    if "_target_" in text:
        raise UsageError(f"{key}: nothing is loaded by its name from the command line; leave out what says _target_.")
    if "hydra" in key and not SWEEPS.fullmatch(text.lstrip("+")):
        raise UsageError(
            f"{key}: Hydra's own settings are not for the command line; results go to out=FOLDER, and your own yaml files to --config-dir."
        )
    if "@" in key:
        raise UsageError(f"{text}: a group has one place; type {key.partition('@')[0]}={value}.")
    if key == "schema" or ("/" in key and "hydra" not in key):
        raise UsageError(f"{key}: there is no such group; --help lists them.")
    if key in config.GROUPS and (value in ("", "null") or value.startswith("[") or text.startswith("~")):
        raise UsageError(f"{text}: a run has one {key}; type {key}=OPTION, one of {', '.join(options(key))}.")
    if config.is_group(key) and re.search(r"\.\.|\$|\\|(?<![\w-])[/~]" + ("|/" if key in config.GROUPS else ""), value):
        path = (
            f"type {key}.path={value}"
            if key in ("model", "dataset")
            else "for yaml files of your own see --config-dir in --help"
        )
        raise UsageError(f"{text}: an option is a name and not a path; {path}.")
    if text.startswith("+") and (key in config.GROUPS or key == "experiment"):
        raise UsageError(f"{text}: type it without +.")
    if text.startswith("~"):
        raise UsageError(f"{text}: nothing can be taken out of the settings; leave it out, or type {key}=null.")
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(text if key else "")
    except HydraException:
        # Hydra's grammar wants a path with ~ or an umlaut in quotes, and a second = too, where nothing but the text itself can be meant.
        prefix = "+" * (len(text) - len(text.lstrip("+")))
        quoted = f"{prefix}{key}='{value}'"
        try:
            if not equals or not key or re.search(r"""[][{}'"\\$,]""", value):
                raise
            text.encode()
            override = parser.parse_override(quoted)
        except (HydraException, UnicodeEncodeError):
            raise UsageError(
                f"{text}: this cannot be read; type group=option or key=value. A value with commas, quotes or brackets in it "
                """goes in two pairs of quotes: 'name="a, b"'."""
            ) from None
        text = quoted
    if override.is_sweep_override() and not sweep:
        raise UsageError(
            f"{text}: several values are a sweep; type --multirun beside it, or {key}=[{value}] for a list."
        )
    return text


def harmless(line: str) -> bool:
    """Whether Hydra may compose this unfinished command line in order to complete it."""
    try:
        for text in line.split(" ")[1:-1]:
            if text and not text.startswith("-"):
                guard(text, sweep=True)
    except UsageError:
        return False
    return True


@contextmanager
def explained(asked: Namespace) -> Iterator[None]:
    """What Hydra and OmegaConf refuse in this block, as errors.UsageError in one line."""
    try:
        yield
    except YAMLError as error:
        raise UsageError(f"A settings file is no yaml: {' '.join(str(error).split())}.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error, asked)) from error


def explain(error: Exception, asked: Namespace) -> str:
    """One line for what Hydra or OmegaConf refused: the options there are, the key that was meant, or what the setting takes."""
    text = str(error)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        # hydra/launcher/name, but experiment/folder/name
        path = error.missing_cfg_file
        group, _, option = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
        return f"{group}={option}: there is no such option; type one of {', '.join(error.options or options(group))}."
    file = re.match(r"In '([^']+)':", text)
    where = f"{file[1]}.yaml: " if file else ""
    key = getattr(cause, "full_key", None) or (found[1] if (found := re.search(r"full_key: (\S+)", text)) else None)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) or re.search(r"Key '[^']+' (is )?not in", text):
        if file and key == file[1].partition("/")[0] and key not in config.GROUPS:
            return f"{where}its first line must be # @package _global_, or all in it belongs to a setting called {key}."
        # A file that is at fault cannot be composed; the rooms can.
        return where + config.unknown(key, config.keys(preview(asked, chosen(asked, config.GROUPS if file else None))))
    if key and (wanted := config.expected_type(str(cause))):
        typed = re.match(r"Error merging override (.*)", text)
        if typed and typed[1].lstrip("+").startswith(f"{key}="):
            return f"{typed[1]}: type {wanted}."
        return f"{where or (f'{typed[1]}: ' if typed else '')}{key} takes {wanted}."
    reason = str(cause).splitlines()[-1 if cause is error and file else 0].strip().rstrip(".")
    if key:
        return f"{where}{key}: {reason}."
    return " ".join(text.split())


def options(group: str) -> list[str]:
    """The names of a group's yaml files."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


# What is shown


def preview(asked: Namespace, overrides: Sequence[str]) -> DictConfig:
    """The configuration that these overrides compose."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=[*overrides, *_searched(asked)])


def chosen(asked: Namespace, groups: Collection[str] | None = None) -> list[str]:
    """The overrides that choose an option of one of these groups; None: of any."""
    pairs = (text.lstrip("+").partition("=") for text in asked.overrides)
    return [
        f"{key}={option}"
        for key, _, option in pairs
        if (groups is None or key in groups) and (CONF / key).is_dir() and "," not in option
    ]


def manual(asked: Namespace) -> str:
    """The text of --help."""
    settings = preview(asked, asked.overrides)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        others = sorted({path.name for path in CONF.iterdir() if path.is_dir()} - {*config.GROUPS, "hydra"})
        groups = {
            group: loader.get_group_options(group, config_name="config", overrides=_searched(asked))
            for group in (*config.GROUPS, *others)
        }
    width = max(map(len, groups))
    listed = "\n".join(f"  {group:<{width}}  {', '.join(names)}" for group, names in groups.items() if names)
    indented = "\n".join(f"  {line}" for line in OmegaConf.to_yaml(settings, resolve=asked.resolve).splitlines())
    return MANUAL.format(groups=listed, settings=indented)


def _searched(asked: Namespace) -> list[str]:
    return [f"hydra.searchpath=['file://{Path(asked.config_dir).absolute()}']"] if asked.config_dir else []
