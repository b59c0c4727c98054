"""Hydra sweeper that searches settings with Optuna: `python -m trainer -m hydra/sweeper=optuna ...`.

Hydra finds sweepers only in this namespace package, and imports this module at every start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.trainer_launcher import SweepLauncher

if TYPE_CHECKING:
    from trainer.sweep.space import Dimension


class Optuna(Sweeper):
    """Searches the settings that have several values; see `conf/hydra/sweeper/optuna.yaml`."""

    def __init__(self, params: dict[str, str] | None = None, **settings: Any):
        self.params, self.settings = params or {}, settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from trainer.core.errors import UsageError
        from trainer.sweep.search import SearchSettings

        plain: dict[str, Any] = {
            key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in self.settings.items()
        }
        self.search_settings = SearchSettings(**plain)
        self.hydra_context, self.config = hydra_context, config
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if not isinstance(launcher, SweepLauncher):
            raise UsageError(
                "hydra/sweeper=optuna follows its members while they train, which Hydra's basic launcher does not "
                "allow; type hydra/launcher=processes"
            )
        self.launcher = launcher

    def sweep(self, arguments: list[str]) -> Any:
        from pathlib import Path

        from trainer.core.errors import UsageError
        from trainer.sweep.search import Search

        assert self.hydra_context is not None and self.config is not None
        assert isinstance(self.launcher, SweepLauncher)
        texts = [f"{key}={value}" for key, value in self.params.items()] + arguments
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        # What is typed on the command line replaces what a file says.
        overrides = {override.get_key_element(): override for override in parser.parse_overrides(texts)}
        space, seeds, fixed = [], [], []
        for key, override in overrides.items():
            if not override.is_sweep_override():
                fixed.append(f"{key}={override.get_value_element_as_str()}")
            elif key == "seed" and override.is_discrete_sweep():
                seeds = [str(value) for value in override.sweep_string_iterator()]
            else:
                space.append(to_dimension(key, override))
        if not space:
            raise UsageError(
                "This search has no settings to vary; type an interval or a choice, such as "
                "'optimizer.lr=tag(log, interval(1e-5, 1e-2))' 'method.rank=choice(4,16,64)'"
            )
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        returns = self.launcher.run_plan(Search(self.search_settings, space, fixed, seeds, folder))
        for result in returns:
            _ = result.return_value  # raises the error of a member that the same command would run again
        return returns


def to_dimension(key: str, override: Override) -> Dimension:
    """Converts the values of an override, such as `interval(1e-5, 1e-2)`, to a setting that a search varies."""
    from trainer.sweep.space import Choice, Range

    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        return Range(key, value.start, value.end, log="log" in value.tags)
    if isinstance(value, RangeSweep) and not isinstance(value, ChoiceSweep):
        values = list(value.range())
        if len(values) > 1:
            return Range(key, values[0], values[-1], step=values[1] - values[0], log=False)
    return Choice(key, tuple(dict.fromkeys(str(text) for text in override.sweep_string_iterator())))
