"""Forward passes of a run's network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.config.schema import Run
from trainer.core import garbage
from trainer.core.batch import Batch, get_conditions
from trainer.objective import denoising_losses

if TYPE_CHECKING:
    import torch


class Predictor:
    """The network of a run, called as its model family, objective and precision require."""

    def __init__(self, run: Run, network: torch.nn.Module, device: torch.device):
        self.run, self.network, self.device = run, network, device
        self.objective = run.model.resolved_objective()
        # All libraries are imported, and forward passes begin.
        garbage.collect_as_usual()

    def predict(
        self, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        """Returns the prediction for noisy latents; see `Family.predict`."""
        with self.run.precision.autocast(self.device):
            return self.run.model.predict(self.network, latents, t, conditions, guidance)

    def losses(self, micro_batch: Batch) -> torch.Tensor:
        """Returns the training loss of each sample of a micro-batch, (b,)."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in micro_batch.items()}
        losses = denoising_losses(
            self.objective,
            self.predict,
            batch["latents"].float(),
            batch["noise"],
            batch["t"],
            get_conditions(batch),
            batch.get("weight"),
        )
        return losses * batch["loss_mask"] if "loss_mask" in batch else losses
