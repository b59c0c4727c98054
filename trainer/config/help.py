"""The text of --help."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from trainer.config.compose import compose_config, search_path
from trainer.config.groups import CONF, GROUPS

if TYPE_CHECKING:
    from argparse import Namespace

HELP = """\
Fine-tune image models.

  python -m trainer                       train the bundled mini model on generated images
  python -m trainer stage=check           show what would be trained, without training
  python -m trainer dataset=pairs dataset.path=FOLDER method.rank=8 optimizer.lr=1e-3
  python -m trainer stage=sample run=ID   generate images with an existing run
  python -m trainer ui                    serve the MLflow pages of the runs in runs/; ui --help lists its options

The same command continues a run that was interrupted. If the run is already finished, the command says so and exits.
Flags: --cfg job prints the settings and nothing else; --multirun runs each combination of key=a,b; --config-dir FOLDER
adds FOLDER/experiment/NAME.yaml as experiment=NAME; eval "$(trainer -sc install=bash)" enables tab completion.

Config groups (group=option):
{groups}

Settings (key=value) of this command line; null: the program chooses the value:
{settings}"""


def help_text(args: Namespace) -> str:
    """Returns the text of --help for a parsed command line."""
    config = compose_config(args.overrides, args.config_dir)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        others = sorted({path.name for path in CONF.iterdir() if path.is_dir()} - {*GROUPS, "hydra"})
        options = {
            group: loader.get_group_options(group, config_name="config", overrides=search_path(args.config_dir))
            for group in (*GROUPS, *others)
        }
    width = max(map(len, options))
    groups = "\n".join(f"  {group:<{width}}  {', '.join(names)}" for group, names in options.items() if names)
    settings = "\n".join(f"  {line}" for line in OmegaConf.to_yaml(config, resolve=args.resolve).splitlines())
    return HELP.format(groups=groups, settings=settings)
