"""Evaluates the network of a run: held-out loss, generated images, and their distance from the targets."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.schema import Run
from trainer.core.batch import Batch
from trainer.core.console import print_line
from trainer.core.errors import StorageError, is_out_of_memory
from trainer.evaluation.held_out_loss import held_out_loss
from trainer.evaluation.metrics.psnr import psnr
from trainer.evaluation.sampling import generate_images
from trainer.method.trainable import swap_weights
from trainer.training.data import TrainingData, held_out_samples, samples_to_generate, unconditional_samples
from trainer.training.predictor import Predictor

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trainer.dataset.transform import TransformedSample
    from trainer.tracking.journal import Journal

MAX_BATCH_SIZE = 32
"""Samples in a forward pass, unless `hardware.micro_batch` or the size of the network allows fewer."""


def evaluation_interval(run: Run, total_steps: int) -> int:
    """Returns the number of steps between two evaluations. Step 0 and the last step are evaluated, too."""
    return run.evaluation.every or max(10, total_steps // 4)


class Evaluator:
    """Evaluates the weights in `average` if it is given, else those of the network.

    `may_halve`: whether a forward pass that runs out of memory is split in two. A process must not do so if all
    processes take part in each forward pass.
    """

    def __init__(
        self,
        run: Run,
        data: TrainingData,
        predictor: Predictor,
        average: dict[str, torch.Tensor] | None = None,
        may_halve: bool = True,
    ):
        self.run, self.data, self.predictor, self.average, self.may_halve = run, data, predictor, average, may_halve
        self.network, self.device = predictor.network, predictor.device
        self.encoder = run.model.build_encoder(self.device)
        parameter_count = sum(parameter.numel() for parameter in self.network.parameters())
        self.batch_size = run.hardware.micro_batch_for(MAX_BATCH_SIZE, parameter_count)

    def evaluate(
        self,
        step: int,
        folder: Path,
        journal: Journal,
        before: Path | None = None,
        generated: Generator[tuple[int, np.ndarray]] | None = None,
    ) -> dict[str, float]:
        """Writes all measurements to the journal and the images to `folder`.

        Returns the measurements: `val/loss` if samples are held out, `val/psnr` if images have a target, and others.
        `before` is the run folder whose images of step 0 are shown beside those of this step (default: `folder`).
        `generated` are images that exist already, as `generate` yields them; by default they are generated.
        """
        start = time.perf_counter()
        values = self._held_out_losses()
        images = generated or self._generate()
        # Closed in any case: while images are generated, the average replaces the weights, and must not be saved as
        # such.
        with closing(images):
            values |= self._record_images(images, step, folder, journal, before or folder)
        journal.log_metrics(step, values | {"perf/evaluation_seconds": time.perf_counter() - start})
        return values

    def follow(self) -> None:
        """Runs the forward passes of `evaluate` only, on the other processes of a sharded network."""
        self._held_out_losses()
        for _ in self._generate():
            pass

    def generate(self, samples: list[TransformedSample], seeds: list[int]) -> Generator[tuple[int, np.ndarray]]:
        """Generates an image for each sample and seed, and yields (index, image), uint8 (H, W, 3).

        The cache must contain the samples and their `unconditional_samples`.
        """
        run, cache = self.run, self.data.cache
        examples = [cache.example(sample) for sample in samples]
        unconditional = [cache.example(sample) for sample in unconditional_samples(run, samples)] or None
        assert run.sample.steps is not None and run.sample.guidance is not None
        with self._eval_mode():
            yield from generate_images(
                run.model,
                self._predict,
                self.encoder,
                examples,
                unconditional,
                seeds,
                steps=run.sample.steps,
                guidance=run.sample.guidance,
                device=self.device,
                batch_size=self.batch_size,
            )

    def _held_out_losses(self) -> dict[str, float]:
        held_out = held_out_samples(self.data, self.run.evaluation.samples)
        examples = [(sample.sample.id, self.data.cache.example(sample)) for sample in held_out]
        if not examples:
            return {}
        with self._eval_mode():
            return held_out_loss(self.run.model, self._predict, examples, self.device, self.batch_size)

    def _generate(self) -> Generator[tuple[int, np.ndarray]]:
        """Returns the images of an evaluation, see `generate`, which has not started yet."""
        samples = [sample for sample, _ in samples_to_generate(self.run, self.data)]
        return self.generate(samples, [self.run.sample.seed + i for i in range(len(samples))])

    def _eval_mode(self) -> AbstractContextManager[None]:
        """Puts the network in eval mode, in which it stays, and returns a context with the average as its weights."""
        self.network.eval()
        return swap_weights(self.network, self.average)

    def _predict(
        self, latents: torch.Tensor, t: torch.Tensor, conditions: Batch, guidance: float | None = None
    ) -> torch.Tensor:
        """Like `Predictor.predict`, but splits the batch in two if memory is exhausted."""
        import torch

        try:
            return self.predictor.predict(latents, t, conditions, guidance)
        except (RuntimeError, MemoryError) as error:
            if len(latents) < 2 or not self.may_halve or not is_out_of_memory(error):
                raise
        halves = slice(len(latents) // 2), slice(len(latents) // 2, None)
        return torch.cat(
            [
                self._predict(latents[half], t[half], {name: x[half] for name, x in conditions.items()}, guidance)
                for half in halves
            ]
        )

    def _record_images(
        self, images: Iterator[tuple[int, np.ndarray]], step: int, folder: Path, journal: Journal, before: Path
    ) -> dict[str, float]:
        """Saves the first `evaluation.shown` images. Returns the mean PSNR of all images that have a target."""
        samples = samples_to_generate(self.run, self.data)
        psnrs = []
        disk_full = False
        for index, image in images:
            sample, comparable = samples[index]
            if comparable:
                psnrs.append(psnr(image, sample.pixels()))
            if index >= self.run.evaluation.shown or disk_full:
                continue
            try:
                path = _save_image(image, sample, comparable, index + 1, step, folder, before)
            except StorageError as error:
                # Measuring does not depend on the images.
                disk_full = True
                warning = f"{error} The images of this evaluation are not saved."
                journal.log_event("warning", text=warning)
                print_line(warning)
                continue
            words = re.sub(r"[^a-z0-9]+", "_", sample.caption.lower()).strip("_")[:40]
            key = f"samples/{index + 1}_{words}"
            journal.log_image(step, key, path.relative_to(folder).as_posix(), sample.caption)
        return {"val/psnr": sum(psnrs) / len(psnrs)} if psnrs else {}


def _save_image(
    image: np.ndarray, sample: TransformedSample, comparable: bool, number: int, step: int, folder: Path, before: Path
) -> Path:
    """Saves an image alone, and in a strip with its controls, the image before training, and the target.

    A sweep shows the controls and the target beside the images of its members, so they are saved alone, too. Returns
    the path of the strip.
    """
    from trainer.dataset import image_grid
    from trainer.training import reference_images

    image_folder = folder / "pictures" / f"step-{step:08d}"
    untrained = before / "pictures" / "step-00000000" / f"{number}.png"
    references = {name.replace("_", " "): sample.pixels(name) for name in sample.control_names}
    images = dict(references)
    if step and untrained.exists():
        images["before training"] = image_grid.load_png(untrained)
    images[f"step {step}"] = image
    if comparable:
        images["target"] = references["target"] = sample.pixels()
    path = image_folder / f"{number}-strip.png"
    image_grid.save_png(image_folder / f"{number}.png", image)
    reference_images.save(folder, number, references)
    # Nearly square, since MLflow shows images in square frames.
    image_grid.save_png(path, image_grid.label_grid(images, columns=math.ceil(math.sqrt(len(images)))))
    return path
