"""Losses of a short training in float64, compared digit by digit: only a change of the mathematics may change them.

`python -m tests.test_golden NAME` prints the losses of a family on this machine. They are copied into
tests/families/NAME.py in the commit that adds the family or changes the losses.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # As pytest does.
    sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from families import FAMILIES, Tiny, case_of, path_of, usual_method

from trainer.cache.store import Cache, count_outcomes
from trainer.core.batch import Batch, get_conditions
from trainer.core.digests import Digests
from trainer.dataset.demo import Demo
from trainer.dataset.splitting import split_samples
from trainer.dataset.transform import build_transform
from trainer.lr_scheduler.cosine import Cosine
from trainer.method.lora import LoraInit
from trainer.method.trainable import trainable_parameters
from trainer.model import Family
from trainer.objective import denoising_losses
from trainer.optimizer.adamw import AdamW
from trainer.training.batches import Batches
from trainer.training.loader import load_batches
from trainer.training.loop import TrainingLoop
from trainer.training.visits import Visits


def machine() -> str:
    """What the last digits depend on."""
    return f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"


def make_batches(family: Family, resolution: str, folder: Path) -> Batches:
    """Returns batches of encoded demo samples."""
    dataset = Demo(resolution=resolution, pairs=6, held_out=1, edits=["night"])
    controls = min(1, max(family.control_counts))
    samples = [
        replace(sample, controls=sample.controls[:controls])
        for sample in split_samples(dataset.read(Digests(folder / "digests")).samples, 0.1, dataset_name="demo").train
    ]
    cache = Cache(folder / "cache", family.recipes(dict.fromkeys(family.components, ""), controls))
    transform = build_transform(dataset, family.size_multiple)
    batches = Batches(Visits(0, 5, dataset, transform, samples), cache, family, micro_batch_size=2)
    encoder = family.build_encoder(torch.device("cpu"))
    transformed = [transform.apply(sample) for sample in samples]
    count_outcomes(cache.recipes, cache.encode_missing(cache.missing(transformed), encoder.encode))
    return batches


def train(tiny: Tiny, folder: Path) -> list[float]:
    """Trains the tiny model of a family for five steps; returns loss and gradient norm of each step.

    The method is LoRA, if the family supports it.
    """
    torch.set_num_threads(1)
    family = tiny.family()
    settings = dict(setting.split("=", 1) for setting in tiny.settings)
    batches = make_batches(family, settings["dataset.resolution"], folder)
    network = family.load_network(torch.float64)
    method = usual_method(family, rank=2, alpha=2.0, init=LoraInit.gaussian)
    method.attach(network, family.target_modules, seed=0)
    network.double()
    parameters = list(trainable_parameters(network).values())

    def losses(batch: Batch) -> torch.Tensor:
        batch = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in batch.items()}
        predict = partial(family.predict, network)
        latents, noise, t = batch["latents"], batch["noise"], batch["t"]
        return denoising_losses(family.objective, predict, latents, noise, t, get_conditions(batch))

    loop = TrainingLoop(
        parameters=parameters,
        losses=losses,
        optimizer=AdamW(lr=1e-2).build(parameters, seed=0),
        learning_rate=lambda step: 1e-2 * Cosine().factor(step, 5),
        batch_size=5,
        max_grad_norm=1.0,
        seed=0,
    )
    steps = loop.steps(load_batches(batches, 0, 5, workers=0))
    return [value for step in steps for value in (step.loss, step.grad_norm)]


def to_paste(losses: list[float]) -> str:
    lines = [f'        "{machine()}": [', *(f"            {value!r}," for value in losses), "        ],"]
    return "\n".join(["    golden = {", *lines, "    }"])


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_equal_the_golden_ones(name: str, tiny_checkpoint: Callable[[str], Tiny], tmp_path: Path):
    golden = case_of(name).golden
    if not golden:
        pytest.fail(f"{path_of(name)} lacks golden; paste what `python -m tests.test_golden {name}` prints", False)
    losses = train(tiny_checkpoint(name), tmp_path)
    assert len(losses) == 10
    if machine() in golden:
        assert losses == golden[machine()]
    # Other machines sum in another order.
    for recorded in golden.values():
        assert losses == pytest.approx(recorded, rel=1e-5)


if __name__ == "__main__":
    for name in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            print(
                f"# {path_of(name)}", to_paste(train(Tiny.save(name, Path(folder) / "model"), Path(folder))), sep="\n"
            )
