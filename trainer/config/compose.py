"""Turns a command line into a checked `Run`: composing with Hydra, settings of existing runs, resolving nulls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from trainer.config.command_line import quote
from trainer.config.fields import convert_untyped, expanded_paths
from trainer.config.groups import CONF, GROUPS, option_name, saved_settings_class
from trainer.config.rules import check, check_which_run
from trainer.config.schema import FREE_IN_POST_TRAINING_STAGES, Run, is_group
from trainer.config.sections import POST_TRAINING_STAGES
from trainer.config.suggestions import all_keys, explain_unknown_key, unknown_keys
from trainer.core.errors import DataError, StorageError, UsageError
from trainer.core.yaml_documents import read_yaml

T = TypeVar("T")


@cache
def register() -> None:
    """Registers the settings classes with Hydra as `schema/run` and `schema/<group>/<option>`.

    The yaml files of the options extend them.
    """
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=Run)
    for group, options in GROUPS.items():
        for option, settings in options.items():
            # Hydra converts a class, too, so this is done only if something must be changed.
            dictionaries = [field.name for field in fields(settings) if str(field.type).startswith("dict")]
            node: Any = OmegaConf.structured(settings) if dictionaries else settings
            for name in dictionaries:
                # The user chooses the keys of this dictionary, and `key={name: value}` should not need a +.
                OmegaConf.set_struct(node[name], False)
            store.store(group=f"schema/{group}", name=option, node=node)


def compose_config(
    overrides: Sequence[str], config_dir: str | None = None, with_hydra: bool = False, sweep: bool = False
) -> DictConfig:
    """Returns the configuration that Hydra composes; `config_dir` is the folder given by --config-dir.

    `with_hydra`: with the settings of Hydra itself. `sweep`: of a sweep, which may have several values of a setting.
    """
    register()
    # `hydra.main`, or a notebook that uses Hydra itself, may have initialized Hydra already.
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            instance = GlobalHydra.instance().hydra
            assert instance is not None
            config = instance.compose_config(
                config_name="config",
                overrides=[*overrides, *search_path(config_dir)],
                run_mode=RunMode.MULTIRUN if sweep else RunMode.RUN,
                from_shell=False,
                with_log_configuration=False,
            )
            if not with_hydra:
                with read_write(config), open_dict(config):
                    del config["hydra"]
            return config
    finally:
        GlobalHydra.instance().hydra = previous


def search_path(config_dir: str | None) -> list[str]:
    """Returns the override that makes Hydra search `config_dir`, too."""
    if config_dir is None:
        return []
    # `hydra_plugins.trainer_recipes` reads the files.
    return [f"hydra.searchpath=[{quote(f'recipes://{Path(config_dir).absolute()}')}]"]


def to_run(
    config: DictConfig, overrides: Sequence[str] = (), find_folder: Callable[[str, str], Path] | None = None
) -> Run:
    """Returns the checked and resolved settings of a composed configuration.

    If the configuration names an existing run by `run` or `resume`, `find_folder(name, out)` returns the folder of that
    run, and the result has its settings except for those in `overrides` (key=value).

    Raises errors.UsageError, and errors of OmegaConf for unknown settings and values of the wrong type.
    """
    if unknown := unknown_keys(config):
        raise UsageError(explain_unknown_key(unknown[0], [key for key in all_keys(config) if key not in unknown]))
    convert_untyped(config)
    for key, path in expanded_paths(config).items():
        OmegaConf.update(config, key, path)
    check_which_run(config)
    name = config.run or config.resume
    if name is not None and find_folder is not None:
        config = _apply_to_saved(config, find_folder(name, config.out), overrides)
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UsageError(f"{', '.join(missing)} must be set; type for example {missing[0]}=VALUE")
    run = resolve(_to_object(config))
    check(run)
    return run


def _to_object(config: DictConfig) -> Run:
    run = OmegaConf.to_object(config)
    assert isinstance(run, Run)
    return run


# Settings of existing runs


def read_run(path: Path) -> Run:
    """Reads the settings that a run saved in `path` (its config.yaml). Raises errors.DataError."""
    return _to_object(_read_config(path))


def _read_config(path: Path) -> DictConfig:
    try:
        values = read_yaml(path)
        schema = OmegaConf.structured(Run)
        for group in GROUPS:
            schema[group] = OmegaConf.structured(saved_settings_class(group, values[group].pop("kind", "")))
        config = OmegaConf.merge(schema, values)
        assert isinstance(config, DictConfig)
        convert_untyped(config)
        return config
    except (
        DataError,
        StorageError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        OmegaConfBaseException,
    ) as error:
        raise DataError(
            f"{path} does not hold the settings of a run ({str(error).splitlines()[0]}); restore it, or start a new run"
        ) from error


def _apply_to_saved(config: DictConfig, folder: Path, overrides: Sequence[str]) -> DictConfig:
    """Returns the settings that the run in `folder` saved, updated with those of `config` that are in `overrides`."""
    typed_keys = [text.lstrip("+").partition("=")[0] for text in overrides]
    post_training = config.stage in POST_TRAINING_STAGES
    if post_training:
        free = tuple(f"{key}." for key in FREE_IN_POST_TRAINING_STAGES)
        refused = [key for key in typed_keys if not f"{key}.".startswith(free)]
        if refused:
            raise UsageError(
                f"stage={config.stage.value} uses the saved settings of the run in {folder}, so {', '.join(refused)} "
                f"cannot be changed; leave it out (only {', '.join(FREE_IN_POST_TRAINING_STAGES)} may be typed)"
            )
    path = folder / "config.yaml"
    # The values that an experiment sets are not in `overrides`. The whole composed configuration is used instead. If it
    # does not agree with the settings of the run to resume, that is refused later.
    has_experiment = any(is_group(key) and key not in GROUPS for key in typed_keys)
    if not post_training and (has_experiment or not path.is_file()):
        return config
    saved = _read_config(path)
    # A typed number of steps replaces a saved number of epochs, and the other way round.
    length = {"steps", "epochs"} if {"steps", "epochs"} & set(typed_keys) else set()
    for key in [*typed_keys, *length, "stage", "run", "resume", "fresh"]:
        if "." in key:
            OmegaConf.update(saved, key, OmegaConf.select(config, key), merge=False)
        else:
            saved[key] = config[key]
    if "out" not in typed_keys:
        # The folder may have been moved since.
        saved.out = str(folder.parent)
    return saved


# Values that depend on several groups


def resolve(run: Run) -> Run:
    """Returns the run with values in place of the nulls that depend on several groups. Raises errors.UsageError."""
    suggested = run.model.suggested
    method = option_name(run.method)
    if method not in run.model.methods:
        raise UsageError(
            f"method={method}: this model can be trained by {', '.join(run.model.methods)}; type "
            f"method={run.model.methods[0]}"
        )
    if run.steps is not None and run.epochs is not None:
        raise UsageError(
            f"steps={run.steps} and epochs={run.epochs} are both set, one of them perhaps by a recipe; to train for "
            f"{run.steps} steps, type epochs=null as well"
        )
    if run.steps is None and run.epochs is None:
        run = replace(run, steps=suggested.steps)
    if run.optimizer.lr is None:
        lr = run.optimizer.default_lr(suggested.learning_rate.get(method))
        if lr is None:
            raise UsageError(
                f"this model suggests no learning rate for method={method}; type optimizer.lr=1e-4 or another number"
            )
        run = replace(run, optimizer=replace(run.optimizer, lr=lr))
    return replace(
        run,
        method=run.method.resolve(run.model.target_modules),
        batch=_default(run.batch, suggested.batch),
        dataset=run.dataset.resolve(suggested.resolution, has_controls=max(run.model.control_counts) > 0),
        sample=replace(
            run.sample,
            steps=_default(run.sample.steps, suggested.sample_steps),
            guidance=_default(run.sample.guidance, suggested.guidance),
        ),
        evaluation=replace(run.evaluation, images=_default(run.evaluation.images, suggested.evaluation_images)),
    )


def _default(value: T | None, default: T) -> T:
    return default if value is None else value
