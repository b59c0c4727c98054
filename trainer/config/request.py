"""Turns a parsed command line into the run that it asks for, for the program and for the Python API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from trainer.config.command_line import check_is_sweep, to_override
from trainer.config.compose import compose_config, to_run
from trainer.config.fields import expanded_paths
from trainer.config.hydra_errors import usage_errors
from trainer.config.recipes import check_hydra
from trainer.config.schema import Run

if TYPE_CHECKING:
    from argparse import Namespace

    FindFolder = Callable[[str, str], Path]
    """Returns the folder of the run with a name in the output folder `out`."""


class Request(NamedTuple):
    """A checked run, and the `key=value` arguments that asked for it."""

    run: Run
    overrides: list[str]


def requested_run(args: Namespace, find_folder: FindFolder) -> Request | None:
    """Returns the run that a parsed command line asks for; None if it asks for a sweep.

    Nothing is written. Raises errors.UsageError.
    """
    if args.multirun:
        return None
    with usage_errors(args):
        config = compose_config(args.overrides, args.config_dir, with_hydra=True)
        if config.hydra.mode == RunMode.MULTIRUN:
            return None
        check_is_sweep(args.overrides)
        check_hydra(config)
        # As Hydra does for a job, so that ${hydra:...} has a value.
        instance = HydraConfig.instance()
        previous = instance.cfg
        instance.set_config(config)
        try:
            settings = config.copy()
            with read_write(settings), open_dict(settings):
                del settings["hydra"]
            return to_request(settings, args, find_folder)
        finally:
            instance.cfg = previous


def check_sweep(args: Namespace) -> None:
    """Checks what Hydra would load for the sweep that a parsed command line asks for, and expands ~ in its paths.

    Raises errors.UsageError.
    """
    with usage_errors(args):
        config = compose_config(args.overrides, args.config_dir, with_hydra=True, sweep=True)
        check_hydra(config)
        # Hydra itself creates the folder of the sweep, in `out`.
        with read_write(config), open_dict(config):
            del config["hydra"]
        args.overrides += [to_override(key, path) for key, path in expanded_paths(config).items()]


def to_request(config: DictConfig, args: Namespace, find_folder: FindFolder) -> Request:
    """Returns the run of a configuration that Hydra has composed for a job. Raises errors.UsageError."""
    # Not resolved, because an interpolation such as ${seed} has no meaning outside the configuration.
    overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    assert isinstance(overrides, list)
    with usage_errors(args):
        return Request(to_run(config, overrides, find_folder), overrides)
