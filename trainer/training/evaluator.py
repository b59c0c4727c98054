"""Measures a run's network as it is now: held-out loss, pictures, and how near they come to their targets."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.schema import Run
from trainer.core.console import print_line
from trainer.core.errors import StorageError, is_out_of_memory
from trainer.evaluation.held_out_loss import held_out_loss
from trainer.evaluation.metrics import psnr
from trainer.evaluation.sampling import generate_images
from trainer.method.trainable import swap_weights
from trainer.training.data import TrainingData, drawn, held_out, unconditional

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trainer.tracking.journal import Journal

AT_ONCE = 32
"""Samples a forward pass, where there is room."""


class Evaluator:
    """`average`, where given, are the weights to judge in place of the network's own. `may_halve`: whether a forward pass may become two where
    memory is short, which no process may decide alone where others take part in it."""

    def __init__(
        self,
        run: Run,
        material: TrainingData,
        network: torch.nn.Module,
        device: torch.device,
        average: dict[str, torch.Tensor] | None = None,
        may_halve: bool = True,
    ):
        self.run, self.material, self.network, self.device, self.average = run, material, network, device, average
        self.may_halve = may_halve
        self.encoder = run.model.build_encoder(device)
        self.at_once = run.hardware.micro_batch_for(AT_ONCE, sum(p.numel() for p in network.parameters()))

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor], guidance: float | None = None
    ) -> torch.Tensor:
        """The family's prediction in the run's precision."""
        with self.run.precision.autocast(self.device):
            return self.run.model.predict(self.network, x, t, cond, guidance)

    def _judging(
        self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor], guidance: float | None = None
    ) -> torch.Tensor:
        """`predict` without gradients: by halves where memory is short."""
        import torch

        try:
            return self.predict(x, t, cond, guidance)
        except (RuntimeError, MemoryError) as error:
            if len(x) < 2 or not self.may_halve or not is_out_of_memory(error):
                raise
        halves = slice(len(x) // 2), slice(len(x) // 2, None)
        return torch.cat(
            [self._judging(x[h], t[h], {name: value[h] for name, value in cond.items()}, guidance) for h in halves]
        )

    def evaluate(self, step: int, folder: Path, journal: Journal, before: Path | None = None) -> float | None:
        """Journal all that is measured at this step, with pictures in `folder`; the held-out loss, None without held-out samples.

        `before` is the folder whose pictures of step 0 stand beside those of this step (null: `folder`).
        """
        began = time.perf_counter()
        values, images = self._asked()
        # Closed whatever happens: while it draws, the average is in the weights' place, and a signal must not have that saved.
        with contextlib.closing(images):
            values |= self._keep(images, step, folder, journal, before or folder)
        journal.log_metrics(step, values | {"perf/evaluation_seconds": time.perf_counter() - began})
        return values.get("val/loss")

    def follow(self) -> None:
        """The forward passes of `evaluate`, for a process that holds a part of the network and leaves the measuring to another."""
        for _ in self._asked()[1]:
            pass

    def _asked(self) -> tuple[dict[str, float], Generator[tuple[int, np.ndarray]]]:
        """All for which `evaluate` asks the network: held-out losses, and what it draws, when it is taken."""
        views = held_out(self.run, self.material, self.run.evaluation.samples)
        rows = [(view.sample.id, self.material.cache.example(view)) for view in views]
        with self._judged():
            losses = held_out_loss(self.run.model, self._judging, rows, self.device, self.at_once) if rows else {}
        wanted = drawn(self.run, self.material)
        return losses, self.draw([view for view, _ in wanted], [self.run.sample.seed + i for i in range(len(wanted))])

    def draw(self, views: list, seeds: list[int]):
        """The place of a view and its picture, uint8 (H, W, 3), for each view and seed; the parts of `to_draw(views)` must be cached."""
        run, cache = self.run, self.material.cache
        rows = [cache.example(view) for view in views]
        bare = [cache.example(view) for view in unconditional(run, views)] or None
        with self._judged():
            yield from generate_images(
                run.model,
                self._judging,
                self.encoder,
                rows,
                bare,
                seeds,
                steps=run.sample.steps,
                guidance=run.sample.guidance,
                device=self.device,
                batch_size=self.at_once,
            )

    def _judged(self):
        self.network.eval()
        return swap_weights(self.network, self.average)

    def _keep(
        self, images: Iterator[tuple[int, np.ndarray]], step: int, folder: Path, journal: Journal, before: Path
    ) -> dict[str, float]:
        """Keep the first pictures beside control, before training and target; compare all with their targets."""
        from trainer.dataset import image_grid

        wanted = drawn(self.run, self.material)
        here, first = folder / "pictures" / f"step-{step:08d}", before / "pictures" / "step-00000000"
        likeness, full = [], None
        for place, image in images:
            i, (view, comparable) = place + 1, wanted[place]
            if comparable:
                likeness.append(psnr(image, view.pixels()))
            # Without room for them the rest is measured all the same.
            if i > self.run.evaluation.shown or full:
                continue
            row = {name.replace("_", " "): view.pixels(name) for name in view.control_names}
            if step and (first / f"{i}.png").exists():
                row["before training"] = image_grid.load_png(first / f"{i}.png")
            row[f"step {step}"] = image
            if comparable:
                row["target"] = view.pixels()
            path = here / f"{i}-strip.png"
            try:
                image_grid.save_png(here / f"{i}.png", image)
                # As near to a square as they go: MLflow shows pictures in square frames.
                image_grid.save_png(path, image_grid.label_grid(row, columns=math.ceil(math.sqrt(len(row)))))
            except StorageError as error:
                full = f"{error} This evaluation goes without its pictures."
                journal.log_event("warning", text=full)
                print_line(full)
                continue
            words = re.sub(r"[^a-z0-9]+", "_", view.caption.lower()).strip("_")[:40]
            journal.log_image(step, f"samples/{i}_{words}", path.relative_to(folder).as_posix(), view.caption)
        return {"val/psnr": sum(likeness) / len(likeness)} if likeness else {}
