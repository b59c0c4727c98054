"""A run with trained weights, as the stages after training use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.rules import open_device
from trainer.config.schema import Run
from trainer.training.build import build_network
from trainer.training.checkpoint import load_best_weights
from trainer.training.data import TrainingData
from trainer.training.evaluator import Evaluator
from trainer.training.predictor import Predictor
from trainer.training.run_folder import find_run_folder

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class TrainedRun:
    """The best weights of a run, and the network that they belong to but have not been loaded into."""

    run: Run
    folder: Path
    device: torch.device
    network: torch.nn.Module
    step: int
    """Step of the weights."""
    weights: dict[str, torch.Tensor]
    """Trained parameters by name, on the device."""

    def evaluator(self, data: TrainingData, before_training: bool = False) -> Evaluator:
        """Returns an evaluator of the best weights, or of the network before training."""
        weights = None if before_training else self.weights
        return Evaluator(self.run, data, Predictor(self.run, self.network, self.device), weights)


def load_trained_run(run: Run) -> TrainedRun:
    """Loads the run that `run.run` names. The other settings of `run` are those of that run."""
    assert run.run is not None
    folder = find_run_folder(run.run, run.out)
    device = open_device(run)
    network = build_network(run, device)
    step, weights = load_best_weights(folder)
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    return TrainedRun(run, folder, device, network, step, weights)
