"""The network as it trains: built in the one right order, and filled with weights that fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoint import Checkpoints
from trainer.config import Run
from trainer.errors import BadData, Usage
from trainer.place import CHECKPOINTS, find
from trainer.report import say

if TYPE_CHECKING:
    import torch


def build(run: Run, device: torch.device) -> torch.nn.Module:
    """The network as it trains. The order matters: frozen weights take their storage type before adapters in float32 are attached."""
    import torch

    # What trains is kept in float32, and is not rounded on the way there.
    dtype = run.precision.dtype() if run.method.is_adapter else torch.float32
    network = run.model.network(dtype, device, run.precision.stored(run.model.keep_high, device))
    run.method.attach(network, run.model.targets, run.seed)
    if run.hardware.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if run.hardware.compile:
        network.compile_repeated_blocks()
    return network


def initial_weights(run: Run) -> dict[str, torch.Tensor]:
    """What `method.init_from` names: the best, else the last weights of a run, or a safetensors file with this program's names."""
    path = Path(run.method.init_from).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        from safetensors.torch import load_file

        return load_file(path)
    return weights_of(find(run.method.init_from, run.out))[1]


def weights_of(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The weights to use of a run and their step: the best by held-out loss, else the last; averaged where an average was kept."""
    checkpoints = Checkpoints(folder / CHECKPOINTS, 1, say)
    loaded = checkpoints.best() or checkpoints.newest(set_aside=False)
    if loaded is None:
        raise BadData(f"{folder} has no checkpoint yet; let it train to its first one")
    return loaded.step, loaded.ema or loaded.weights


def fill(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor], source: Path) -> None:
    """Put weights into parameters of the same names and shapes; raises errors.Usage where they differ."""
    import torch

    wrong = [f"{name} is missing" for name in parameters if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in parameters]
    for name in parameters.keys() & weights.keys():
        if weights[name].shape != parameters[name].shape:
            wrong.append(f"{name} has shape {tuple(weights[name].shape)}, not {tuple(parameters[name].shape)}")
    if wrong:
        raise Usage(
            f"the weights in {source} do not fit ({len(wrong)} tensors: {'; '.join(sorted(wrong)[:3])}); type the method they were trained with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
