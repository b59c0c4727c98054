"""The network as it trains: built in the one right order, and filled with weights that fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.compose import read_run
from trainer.config.schema import Run
from trainer.core import tensor_files
from trainer.core.console import print_line
from trainer.core.errors import DataError, UsageError
from trainer.distributed.sharding import shard_like
from trainer.export.read import is_adapter_path, read_adapter
from trainer.training.checkpoint import Checkpoints
from trainer.training.run_folder import CHECKPOINTS, find

if TYPE_CHECKING:
    import torch


def build(run: Run, device: torch.device, divide: Callable[[torch.nn.Module], None] | None = None) -> torch.nn.Module:
    """The network as it trains. The order matters: frozen weights take their storage type before adapters in float32 are attached.

    `divide`, where given, moves this process's part of it to the device, which need not have room for more.
    """
    import torch

    there = torch.device("cpu") if divide else device
    types = run.model.weights().dtypes()
    run.precision.check_checkpoint(types)
    stored = run.precision.quantizer(run.model.unquantized_modules, there, types)
    network = run.model.load_network(run.method.dtype(run.precision.dtype()), there, stored)
    run.method.attach(network, run.model.target_modules, run.seed)
    if run.hardware.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if run.hardware.compile:
        network.compile_repeated_blocks()
    if divide:
        divide(network)
    return network


def foresee(run: Run, begins: bool = True) -> None:
    """Raise errors.UsageError for what would be refused when the network is built, as far as the headers of files tell; `begins`: whether the run has
    no weights of its own yet."""
    run.precision.check_checkpoint(run.model.weights().dtypes())
    if begins and run.method.init_from is not None and not is_adapter_path(Path(run.method.init_from).expanduser()):
        find(run.method.init_from, run.out)


def begin_from(run: Run, network: torch.nn.Module) -> None:
    """Give what trains the weights that `method.init_from` names: those to use of a run, or of a file or folder that this program, diffusers,
    peft, ComfyUI or kohya's scripts wrote. An adapter begins by doing what that one does, whatever alpha either has. Raises errors.UsageError where
    they do not fit."""
    from trainer.method.trainable import trainable_parameters

    path, method = Path(run.method.init_from).expanduser(), run.method
    if not method.is_adapter:
        weights = tensor_files.load_tensors(path) if path.is_file() else weights_of(find(method.init_from, run.out))[1]
        fill(trainable_parameters(network), weights, path)
        return
    from trainer.method.adapter_formats import from_checkpoint
    from trainer.method.adapter_loading import load_into

    if is_adapter_path(path):
        found = read_adapter(path, run.model, method.alpha / method.rank)
    else:
        folder = find(method.init_from, run.out)
        theirs = read_run(folder / "config.yaml").method
        found = from_checkpoint(weights_of(folder)[1], theirs.alpha / theirs.rank if theirs.is_adapter else 1.0)
    load_into(found, network, method.init_from)


def weights_of(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The weights to use of a run and their step: the best by held-out loss, else the last; averaged where an average was kept."""
    checkpoints = Checkpoints(folder / CHECKPOINTS, 1, print_line)
    loaded = checkpoints.best() or checkpoints.newest(set_aside=False)
    if loaded is None:
        raise DataError(f"{folder} has no checkpoint yet; let it train to its first one")
    return loaded.step, loaded.ema or loaded.weights


def fill(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor], source: Path) -> None:
    """Put weights into parameters of the same names and shapes; raises errors.UsageError where they differ."""
    import torch

    wrong = [f"{name} is missing" for name in parameters if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in parameters]
    for name in parameters.keys() & weights.keys():
        if weights[name].shape != parameters[name].shape:
            wrong.append(f"{name} has shape {tuple(weights[name].shape)}, not {tuple(parameters[name].shape)}")
    if wrong:
        raise UsageError(
            f"the weights in {source} do not fit ({len(wrong)} tensors: {'; '.join(sorted(wrong)[:3])}); type the method they were trained with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(weights[name], parameter))
