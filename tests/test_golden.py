"""Losses of a short training in float64, compared digit by digit: only a change of the mathematics may change them.

`python -m tests.test_golden` prints the losses of this machine, to be copied here in the commit that changes them.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Tiny

from trainer.cache.store import Cache, count_outcomes
from trainer.config.groups import GROUPS
from trainer.core.batch import Batch, get_conditions
from trainer.core.digests import Digests
from trainer.dataset.demo import Demo
from trainer.dataset.splitting import split_samples
from trainer.dataset.transform import build_transform
from trainer.lr_scheduler.cosine import Cosine
from trainer.method.lora import Lora, LoraInit
from trainer.method.trainable import trainable_parameters
from trainer.model import Family
from trainer.objective import denoising_losses
from trainer.optimizer.adamw import AdamW
from trainer.training.batches import Batches
from trainer.training.loader import load_batches
from trainer.training.loop import TrainingLoop

GOLDEN = {
    "flux_kontext": {
        "torch 2.13.0, AVX512": [
            1.3145386465805269,
            0.08949942101053893,
            1.3630077366238278,
            0.07970928489450042,
            1.4205035235804404,
            0.08625643831954395,
            1.4941573277788864,
            0.09233096794470201,
            1.3430457270085892,
            0.12535149505344456,
        ],
    },
    "qwen_image_edit": {
        "torch 2.13.0, AVX512": [
            1.3443999970344642,
            0.06776251263634918,
            1.5400633716575567,
            0.0937737609821519,
            1.5780224074574523,
            0.09933976370967992,
            1.5285121191513975,
            0.08784270725490796,
            1.2740505068939534,
            0.065877429062039,
        ],
    },
    "pmg": {
        "torch 2.13.0, AVX512": [
            0.9656844530449684,
            0.1445836161101129,
            1.0418503607118974,
            0.369096909846615,
            1.1681318276588022,
            0.2802728812012267,
            1.127737031200523,
            0.7583065700815934,
            1.0969710106257191,
            0.15001804932727927,
        ],
    },
    "sd15": {
        "torch 2.13.0, AVX512": [
            0.9629697546104405,
            0.11384877745714225,
            1.0629197366667653,
            0.1614411082719154,
            1.1487053808334795,
            0.16829014192755776,
            1.1617841277710894,
            0.24885483104124764,
            1.0911668724515966,
            0.14174321267481943,
        ],
    },
    "sdxl": {
        "torch 2.13.0, AVX512": [
            0.9839146764228286,
            0.687204275720285,
            1.189288481432434,
            1.290379276857514,
            1.0827222386306248,
            0.5680566029395461,
            1.1299941687315491,
            0.4651890832460931,
            0.999687900041343,
            0.46190906831537815,
        ],
    },
}


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
    batches = Batches(samples, cache, family, dataset, transform, seed=0, batch_size=5, micro_batch_size=2)
    encoder = family.build_encoder(torch.device("cpu"))
    transformed = [batches.transformed(0, index) for index in range(len(samples))]
    count_outcomes(cache.recipes, cache.encode_missing(cache.missing(transformed), encoder.encode))
    return batches


def train(name: str, folder: Path) -> list[float]:
    """Trains the tiny model of a family for five steps; returns loss and gradient norm of each step.

    The method is LoRA, or the first one that the family supports.
    """
    torch.set_num_threads(1)
    tiny = Tiny(name, GROUPS["model"][name].save_tiny_checkpoint(folder / "model"))
    family = tiny.family()
    settings = dict(setting.split("=", 1) for setting in tiny.settings)
    batches = make_batches(family, settings["dataset.resolution"], folder)
    network = family.load_network(torch.float64)
    if "lora" in family.methods:
        method = Lora(rank=2, alpha=2.0, init=LoraInit.gaussian)
    else:
        method = GROUPS["method"][family.methods[0]]()
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


@pytest.mark.parametrize("name", sorted(GROUPS["model"]))
def test_losses_equal_the_golden_ones(name: str, tmp_path: Path):
    losses = train(name, tmp_path)
    assert len(losses) == 10
    assert name in GOLDEN, f"add the losses that `python -m tests.test_golden {name}` prints"
    golden = GOLDEN[name]
    if machine() in golden:
        assert losses == golden[machine()]
    # Other machines sum in another order.
    assert losses == pytest.approx(next(iter(golden.values())), rel=1e-5)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(GROUPS["model"]):
        with tempfile.TemporaryDirectory() as folder:
            print(name, machine(), train(name, Path(folder)), sep="\n")
