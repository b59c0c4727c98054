"""Optimizers and learning rates: arguments that arrive, resume to the bit, what schedules say, what is refused, bitsandbytes kept in hand."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import diffusers.optimization
import hydra
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from torch import nn

from trainer.__main__ import main
from trainer.config.compose import compose_config, register, resolve, to_run
from trainer.config.groups import CONF, GROUPS
from trainer.config.schema import Run
from trainer.core.errors import UsageError
from trainer.core.rng import normal
from trainer.lr_scheduler import LRScheduler
from trainer.lr_scheduler.constant import Constant
from trainer.lr_scheduler.cosine import Cosine
from trainer.lr_scheduler.cosine_restarts import CosineRestarts
from trainer.lr_scheduler.linear import Linear
from trainer.lr_scheduler.polynomial import Polynomial
from trainer.method.full import Full
from trainer.method.lora import Lora
from trainer.model.flux_kontext import FluxKontext
from trainer.optimizer import Optimizer
from trainer.optimizer.adam8bit import Adam8bit
from trainer.optimizer.adamw import AdamW
from trainer.optimizer.adamw8bit import AdamW8bit
from trainer.optimizer.prodigy import Prodigy
from trainer.optimizer.sgd import SGD
from trainer.tracking.journal import read_records
from trainer.training.checkpoint import Checkpoints
from trainer.training.loop import TrainingLoop

ALL = [
    AdamW(lr=1e-2),
    AdamW8bit(lr=1e-2),
    Adam8bit(lr=1e-2, weight_decay=0.1),
    Prodigy(lr=1.0, d0=1e-3),
    Prodigy(lr=1.0, d0=1e-3, growth_rate=1.1, slice_p=11, beta3=0.9, decouple=False),
    SGD(lr=0.1),
    SGD(lr=0.1, momentum=0.0, weight_decay=0.1),
]
COSINE = Cosine(warmup=3, min_ratio=0.1)
SHAPES = [(64, 80), (7,)]
"""The first is large enough for moments of a byte, the second is not."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def parameters_of(weights: list[torch.Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(weight.clone()) for weight in weights]


def train(
    settings: Optimizer,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: range,
    schedule: LRScheduler = COSINE,
) -> list[float | None]:
    """Steps towards fixed targets; the effective rate of each."""
    targets = [normal(shape, "target", index) for index, shape in enumerate(SHAPES)]

    def losses(rows: dict[str, torch.Tensor]) -> torch.Tensor:
        return (
            sum((parameter - target).square().sum() for parameter, target in zip(parameters, targets, strict=True))
            * rows["weight"]
        )

    batches = ((step, [{"weight": torch.tensor([1.0])}]) for step in steps)
    rates = []
    loop = TrainingLoop(
        parameters=parameters,
        losses=losses,
        optimizer=optimizer,
        learning_rate=lambda step: settings.lr * schedule.factor(step, 30),
        batch_size=1,
        max_grad_norm=1.0,
        seed=0,
    )
    for _ in loop.steps(batches):
        rates.append(settings.effective_lr(optimizer))
    return rates


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_every_optimizer_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(settings: Optimizer, tmp_path: Path):
    whole = parameters_of([torch.ones(shape) for shape in SHAPES])
    optimizer = settings.create(whole)
    train(settings, whole, optimizer, range(1, 7))
    first = parameters_of([torch.ones(shape) for shape in SHAPES])
    before = settings.create(first)
    train(settings, first, before, range(1, 4))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(
        3, {str(i): parameter.detach() for i, parameter in enumerate(first)}, before.state_dict(), None, {}
    )
    loaded = checkpoints.newest()
    again = parameters_of([loaded.weights[str(i)] for i in range(len(SHAPES))])
    after = settings.create(again)
    after.load_state_dict(loaded.optimizer)
    train(settings, again, after, range(4, 7))
    for one, other, start in zip(whole, again, first, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, start)


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_every_argument_reaches_the_optimizer(settings: Optimizer):
    optimizer = settings.create(parameters_of([torch.ones(3)]))
    (group,) = optimizer.param_groups
    arguments = getattr(optimizer, "args", None)
    for name, value in asdict(settings).items():
        found = group[name] if name in group else getattr(arguments, name)
        expected = (
            math.inf if (name, value) == ("growth_rate", None) else tuple(value) if isinstance(value, list) else value
        )
        assert found == expected, name


def test_moments_of_large_tensors_take_a_byte():
    parameters = parameters_of([torch.ones(shape) for shape in SHAPES])
    settings = AdamW8bit(lr=1e-2)
    optimizer = settings.create(parameters)
    train(settings, parameters, optimizer, range(1, 2))
    assert [optimizer.state[parameter]["state1"].dtype for parameter in parameters] == [torch.uint8, torch.float32]


def test_bitsandbytes_adam_and_adamw_are_one_where_their_values_are():
    ends = []
    for kind in (AdamW8bit, Adam8bit):
        settings, parameters = kind(lr=1e-2, weight_decay=0.1), parameters_of([torch.ones(shape) for shape in SHAPES])
        train(settings, parameters, settings.create(parameters), range(1, 5))
        ends.append(parameters)
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_prodigy_finds_its_rate_and_tells_it():
    settings, parameters = Prodigy(lr=1.0), parameters_of([torch.zeros(shape) for shape in SHAPES])
    optimizer = settings.create(parameters)
    rates = train(settings, parameters, optimizer, range(1, 101), Constant(warmup=2))
    assert rates[0] == pytest.approx(1e-6 / 2)
    assert max(rates) > 1e-2
    (group,) = optimizer.param_groups
    assert rates[-1] == group["d"] * group["lr"]


@pytest.mark.parametrize("settings", [AdamW(lr=1.0), SGD(lr=1.0), AdamW8bit(lr=1.0)], ids=str)
def test_where_the_rate_is_given_there_is_no_other(settings: Optimizer):
    assert settings.effective_lr(settings.create(parameters_of([torch.ones(3)]))) is None


def test_an_optimizer_prints_nothing(capsys: pytest.CaptureFixture):
    for settings in ALL:
        settings.create(parameters_of([torch.ones(3)]))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "values", "remedy"),
    [
        (AdamW, {"lr": 0.0}, "above 0"),
        (AdamW, {"weight_decay": -1.0}, "type 0"),
        (AdamW, {"eps": 0.0}, "1e-8"),
        (AdamW8bit, {"betas": [0.9]}, "betas="),
        (Prodigy, {"d0": 0.0}, "d0=1e-6"),
        (Prodigy, {"growth_rate": 1.0}, "or null"),
        (Prodigy, {"beta3": 1.0}, "beta3=null"),
        (Prodigy, {"slice_p": 0}, "type 1 for all"),
        (SGD, {"momentum": 1.0}, "such as 0.9"),
        (SGD, {"nesterov": True, "momentum": 0.0}, "momentum=0.9"),
    ],
)
def test_values_that_train_nothing_are_refused(kind: type[Optimizer], values: dict, remedy: str):
    with pytest.raises(UsageError, match=remedy):
        kind(**values)


# The learning rate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = FluxKontext.save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return to_run(compose_config(["model=flux_kontext", *settings]))


@pytest.mark.parametrize(
    ("settings", "method", "rate"),
    [
        (AdamW(), Lora(), 1e-4),
        (AdamW(), Full(), 1e-5),
        (AdamW8bit(), Lora(), 1e-4),
        (Adam8bit(), Full(), 1e-5),
        (Prodigy(), Lora(), 1.0),
        (Prodigy(), Full(), 1.0),
        (SGD(), Lora(), 0.1),
        (SGD(momentum=0.0), Lora(), 1.0),
        (Prodigy(lr=0.5), Lora(), 0.5),
    ],
    ids=str,
)
def test_a_learning_rate_that_is_not_set_follows_from_model_method_and_optimizer(
    run: Run, settings: Optimizer, method, rate: float
):
    assert resolve(replace(run, optimizer=settings, method=method)).optimizer.lr == rate


def test_every_option_of_the_optimizer_composes_with_the_values_its_yaml_gives():
    register()
    for name, kind in GROUPS["optimizer"].items():
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose(f"optimizer/{name}").optimizer
        assert OmegaConf.to_object(composed) == kind(), name


def theirs(name: str, warmup: int, steps: int, **options) -> list[float]:
    """The factors of a schedule of diffusers or transformers, for each of its own steps 0 .. steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    functions = {
        "constant": lambda: diffusers.optimization.get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps),
        "cosine": lambda: diffusers.optimization.get_cosine_schedule_with_warmup(optimizer, warmup, steps),
        "floor": lambda: transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, **options),
        "restarts": lambda: diffusers.optimization.get_cosine_with_hard_restarts_schedule_with_warmup(
            optimizer, warmup, steps, **options
        ),
        "polynomial": lambda: diffusers.optimization.get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, steps, **options
        ),
    }
    (factor,) = functions[name]().lr_lambdas
    return [factor(step) for step in range(steps + 1)]


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("ours", "name", "options"),
    [
        (Constant(), "constant", {}),
        (Linear(), "linear", {}),
        (Cosine(), "cosine", {}),
        (Cosine(min_ratio=0.2), "floor", {"min_lr_rate": 0.2}),
        (CosineRestarts(cycles=3), "restarts", {"num_cycles": 3}),
        (Polynomial(power=3.0, min_ratio=0.05), "polynomial", {"power": 3.0, "lr_end": 0.05}),
        (Polynomial(power=1.0, min_ratio=0.1), "polynomial", {"power": 1.0, "lr_end": 0.1}),
    ],
    ids=str,
)
def test_schedules_are_those_of_diffusers_and_transformers(ours: LRScheduler, name: str, options: dict, warmup: int):
    steps, ours = 60, replace(ours, warmup=warmup)
    expected = theirs(name, warmup, steps, **options)
    found = [ours.factor(step, steps) for step in range(1, steps + 1)]
    # A warm-up of theirs begins with a step of rate 0; ours is that step ahead until both are at the full rate.
    assert found[:warmup] == pytest.approx(expected[1 : warmup + 1])
    assert found[warmup:] == pytest.approx(expected[warmup:steps], abs=1e-12)


@pytest.mark.parametrize(
    "ours",
    [Linear(min_ratio=0.1), Cosine(min_ratio=0.1), CosineRestarts(min_ratio=0.1), Polynomial(min_ratio=0.1)],
    ids=str,
)
def test_every_schedule_ends_near_its_floor_and_never_below(ours: LRScheduler):
    factors = [ours.factor(step, 500) for step in range(1, 501)]
    assert factors[0] == 1
    assert min(factors) >= 0.1
    assert factors[-1] == pytest.approx(0.1, abs=0.005)


def test_restarts_begin_again_from_the_full_rate():
    factors = [CosineRestarts(cycles=4).factor(step, 400) for step in range(1, 401)]
    assert [index for index, factor in enumerate(factors) if factor == 1] == [0, 100, 200, 300]


@pytest.mark.parametrize(
    ("ours", "remedy"),
    [
        (CosineRestarts(cycles=0), "1 or more"),
        (CosineRestarts(cycles=9, warmup=2), "type fewer"),
        (Polynomial(power=0.0), "lr_scheduler=constant"),
        (Linear(warmup=10), "0 to 9"),
        (Linear(min_ratio=1.5), "from 0 to 1"),
    ],
    ids=str,
)
def test_schedules_that_do_not_fit_are_refused(ours: LRScheduler, remedy: str):
    with pytest.raises(UsageError, match=remedy):
        ours.check(10)


# The whole program


def test_the_effective_rate_is_logged_beside_the_given_one(run: Run, tmp_path: Path):
    small = [
        "dataset.pairs=3",
        "dataset.held_out=1",
        "evaluation.images=1",
        "sample.steps=1",
        "tracking=none",
        "hardware=cpu",
        "method.rank=2",
    ]
    model = ["model=flux_kontext", f"model.path={run.model.path}", "model.text_length=8", "dataset.resolution=32"]
    assert (
        main(
            [
                *model,
                *small,
                "optimizer=prodigy",
                "optimizer.d0=1e-4",
                "lr_scheduler=linear",
                "steps=3",
                "batch=2",
                f"out={tmp_path}",
            ]
        )
        == 0
    )
    (journal,) = tmp_path.glob("*/journal.jsonl")
    values = [record["values"] for _, record in read_records(journal) if "train/lr" in record.get("values", {})]
    assert [value["train/lr"] for value in values] == pytest.approx([1, 2 / 3, 1 / 3])
    assert values[0]["train/lr_effective"] == pytest.approx(1e-4)


def test_bitsandbytes_is_imported_by_none_but_its_optimizers_and_asks_the_hub_for_nothing(tmp_path: Path):
    """In a process of its own, with a `kernels` that tells on whoever asks it for one; on processors without AVX512_BF16 nobody would."""
    (tmp_path / "kernels.py").write_text(
        "def get_kernel(*_, **__):\n    import pathlib\n    pathlib.Path(__file__).with_name('told').touch()\n    raise OSError\n"
    )
    program = """
import sys, torch
from trainer.optimizer.adamw8bit import AdamW8bit
import diffusers.models.transformers.transformer_flux, peft.tuners.lora.model
assert sys.modules["bitsandbytes"] is None
assert not peft.import_utils.is_bnb_available()
parameter = torch.nn.Parameter(torch.ones(64, 80))
optimizer = AdamW8bit(lr=1e-2).create([parameter])
parameter.grad = torch.ones(64, 80)
optimizer.step()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(CONF.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "told").exists()
