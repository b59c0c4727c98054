"""Optimizers and learning rate schedules: settings, resuming, stochastic rounding, comparison with other libraries."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers.optimization
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from torch import nn

from trainer.__main__ import main
from trainer.config.compose import compose_config, register, resolve, to_run
from trainer.config.groups import CONF, GROUPS
from trainer.config.schema import Run
from trainer.core.batch import Batch
from trainer.core.errors import UsageError
from trainer.core.rng import normal
from trainer.lr_scheduler import LRScheduler
from trainer.lr_scheduler.constant import Constant
from trainer.lr_scheduler.cosine import Cosine
from trainer.lr_scheduler.cosine_restarts import CosineRestarts
from trainer.lr_scheduler.linear import Linear
from trainer.lr_scheduler.polynomial import Polynomial
from trainer.method import Method
from trainer.method.full import Full
from trainer.method.lora import Lora
from trainer.model.flux_kontext import FluxKontext
from trainer.optimizer import Optimizer, stochastic_rounding
from trainer.optimizer.adafactor import Adafactor
from trainer.optimizer.adam8bit import Adam8bit
from trainer.optimizer.adamw import AdamW
from trainer.optimizer.adamw8bit import AdamW8bit
from trainer.optimizer.custom import Custom
from trainer.optimizer.lion8bit import Lion8bit
from trainer.optimizer.prodigy import Prodigy
from trainer.optimizer.schedulefree import ScheduleFree
from trainer.optimizer.sgd import SGD
from trainer.optimizer.stochastic_rounding import StochasticRounding, round_stochastically
from trainer.tracking.journal import read_records
from trainer.training.checkpoint import Checkpoints
from trainer.training.loop import TrainingLoop

LISTED = [
    AdamW(lr=1e-2),
    AdamW8bit(lr=1e-2),
    Adam8bit(lr=1e-2, weight_decay=0.1),
    Prodigy(lr=1.0, d0=1e-3),
    Prodigy(lr=1.0, d0=1e-3, growth_rate=1.1, slice_p=11, beta3=0.9, decouple=False),
    SGD(lr=0.1),
    SGD(lr=0.1, momentum=0.0, weight_decay=0.1),
    Adafactor(lr=1e-2),
    Adafactor(lr=1e-2, beta1=0.9, weight_decay=0.1, scale_parameter=True, clip_threshold=0.5, decay_rate=-0.5),
    Lion8bit(lr=1e-3),
    ScheduleFree(lr=1e-2),
    ScheduleFree(lr=1e-2, r=1.0, weight_lr_power=1.0, weight_decay=0.1),
    Custom(lr=1e-2, name="stableadamw"),
    Custom(lr=1e-3, name="came", weight_decay=0.1, arguments={"clip_threshold": 0.5}),
]
"""Optimizers with settings that are worth a test."""
OPTIMIZERS = [
    *LISTED,
    *(kind(lr=kind().default_lr(1e-2)) for kind in GROUPS["optimizer"].values() if kind not in {*map(type, LISTED)}),
]
"""Each optimizer. One that is not listed has its defaults."""
COSINE = Cosine(warmup=3, min_ratio=0.1)
SHAPES = [(64, 80), (7,)]
"""The first is large enough for 8-bit moments, the second is not."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape)) for shape in SHAPES]


def train(
    settings: Optimizer,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: range,
    schedule: LRScheduler = COSINE,
) -> list[float | None]:
    """Trains towards fixed targets; returns the effective learning rate of each step."""
    targets = [normal(shape, "target", index) for index, shape in enumerate(SHAPES)]

    def losses(batch: Batch) -> torch.Tensor:
        errors = (parameter - target for parameter, target in zip(parameters, targets, strict=True))
        return sum(error.square().sum() for error in errors) * batch["weight"]

    loop = TrainingLoop(
        parameters=parameters,
        losses=losses,
        optimizer=optimizer,
        learning_rate=lambda step: settings.lr * schedule.factor(step, 30),
        batch_size=1,
        max_grad_norm=1.0,
        seed=0,
    )
    batches = ((step, [{"weight": torch.tensor([1.0])}]) for step in steps)
    return [settings.effective_lr(optimizer) for _ in loop.steps(batches)]


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=str)
def test_optimizer_resumes_bit_for_bit_from_a_checkpoint(settings: Optimizer, tmp_path: Path):
    uninterrupted = make_parameters()
    train(settings, uninterrupted, settings.create(uninterrupted), range(1, 7))
    interrupted = make_parameters()
    optimizer = settings.create(interrupted)
    train(settings, interrupted, optimizer, range(1, 4))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    weights = {str(i): parameter.detach() for i, parameter in enumerate(interrupted)}
    checkpoints.save(3, weights, optimizer.state_dict(), None, {})
    checkpoint = checkpoints.newest()
    resumed = [nn.Parameter(checkpoint.weights[str(i)].clone()) for i in range(len(SHAPES))]
    optimizer = settings.create(resumed)
    optimizer.load_state_dict(checkpoint.optimizer)
    train(settings, resumed, optimizer, range(4, 7))
    for expected, parameter, before in zip(uninterrupted, resumed, interrupted, strict=True):
        assert torch.equal(parameter, expected)
        assert not torch.equal(parameter, before)


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=str)
def test_every_setting_reaches_the_optimizer(settings: Optimizer):
    optimizer = settings.create([nn.Parameter(torch.ones(3))])
    (group,) = optimizer.param_groups
    given = asdict(settings)
    if isinstance(settings, Custom):
        given |= given.pop("arguments")
        del given["name"]
    for name, value in given.items():
        # bitsandbytes keeps some of its settings in `args`, and CAME as attributes.
        found = group[name] if name in group else getattr(getattr(optimizer, "args", optimizer), name)
        if name == "growth_rate" and value is None:
            value = math.inf
        assert found == (tuple(value) if isinstance(value, list) else value), name


def test_schedulefree_averages_as_its_package_does():
    settings, parameters = ScheduleFree(lr=1e-2, r=0.5), make_parameters()
    optimizer = settings.create(parameters)
    average = [torch.zeros(shape) for shape in SHAPES]
    settings.write_average(optimizer, average)
    assert all(torch.equal(mean, parameter) for mean, parameter in zip(average, parameters, strict=True))
    train(settings, parameters, optimizer, range(1, 7))
    before = [parameter.detach().clone() for parameter in parameters]
    settings.write_average(optimizer, average)
    assert all(torch.equal(old, parameter) for old, parameter in zip(before, parameters, strict=True))
    optimizer.eval()
    for old, mean, parameter in zip(before, average, parameters, strict=True):
        torch.testing.assert_close(mean, parameter.detach(), rtol=0, atol=1e-7)
        assert not torch.allclose(mean, old, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Custom(lr=1e-3, name="camel"), "type one of came"),
        (Custom(lr=1e-3, name="came", arguments={"clip": 1}), "came has no clip; it has lr, betas"),
        (Custom(lr=1e-3, name="came", arguments={"betas": 3}), "does not accept these settings"),
        (Custom(lr=1e-3, name="schedulefreeadamw"), "type optimizer=schedulefree"),
        (Custom(lr=1e-3, name="lbfgs"), "does not work with this training loop"),
        (Custom(lr=1e-3, name="kron"), "dtype at .* which is neither a tensor nor JSON"),
        (Custom(lr=1e-3, name="sm3", weight_decay=0.1), "type optimizer.weight_decay=0"),
    ],
    ids=str,
)
def test_custom_optimizer_that_cannot_train_is_refused(settings: Custom, message: str):
    with pytest.raises(UsageError, match=message):
        settings.check()


def test_custom_optimizer_with_an_incomplete_state_is_refused():
    class Forgetful(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"state": {}}

    class Incomplete(Custom):
        def create(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            return Forgetful(parameters, lr=self.lr, momentum=0.9)

    with pytest.raises(UsageError, match="does not continue exactly"):
        Incomplete(lr=1e-3, name="forgetful").check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lr_scheduler=cosine"], "type lr_scheduler=constant"),
        (["experiment=floorplans_a100", "model.path=x", "dataset.path=x"], "type lr_scheduler=constant"),
        (["ema=0.9"], "type ema=null"),
        (
            ["model=flux_kontext", "precision=bf16", "method=full", "method.master_weights=none"],
            "needs all of them at once",
        ),
    ],
)
def test_schedulefree_refuses_settings_that_contradict_it(settings: list[str], message: str):
    register()
    with pytest.raises(UsageError, match=message):
        to_run(compose_config(["optimizer=schedulefree", *settings]))


def test_learning_rate_may_be_a_share_of_the_suggested_one():
    register()
    lion, adamw = (to_run(compose_config([f"optimizer={name}"])).optimizer for name in ("lion8bit", "adamw"))
    assert lion.lr == adamw.lr / 3


def test_moments_of_large_tensors_are_8bit():
    parameters, settings = make_parameters(), AdamW8bit(lr=1e-2)
    optimizer = settings.create(parameters)
    train(settings, parameters, optimizer, range(1, 2))
    assert [optimizer.state[parameter]["state1"].dtype for parameter in parameters] == [torch.uint8, torch.float32]


def test_adam8bit_equals_adamw8bit_with_equal_settings():
    results = []
    for kind in (AdamW8bit, Adam8bit):
        settings, parameters = kind(lr=1e-2, weight_decay=0.1), make_parameters()
        train(settings, parameters, settings.create(parameters), range(1, 5))
        results.append(parameters)
    assert all(torch.equal(adamw, adam) for adamw, adam in zip(*results, strict=True))


def test_prodigy_reports_its_estimated_learning_rate():
    settings, parameters = Prodigy(lr=1.0), [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = settings.create(parameters)
    rates = train(settings, parameters, optimizer, range(1, 101), Constant(warmup=2))
    assert rates[0] == pytest.approx(1e-6 / 2)
    assert max(rates) > 1e-2
    (group,) = optimizer.param_groups
    assert rates[-1] == group["d"] * group["lr"]


@pytest.mark.parametrize("settings", [AdamW(lr=1.0), SGD(lr=1.0), AdamW8bit(lr=1.0)], ids=str)
def test_other_optimizers_report_no_effective_learning_rate(settings: Optimizer):
    assert settings.effective_lr(settings.create([nn.Parameter(torch.ones(3))])) is None


def test_optimizers_print_nothing(capsys: pytest.CaptureFixture):
    for settings in OPTIMIZERS:
        settings.create([nn.Parameter(torch.ones(3))])
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
def test_invalid_settings_are_refused(kind: type[Optimizer], values: dict[str, Any], remedy: str):
    with pytest.raises(UsageError, match=remedy):
        kind(**values)


# Stochastic rounding


def test_stochastic_rounding_returns_a_neighbor_and_the_value_on_average():
    values = normal((200, 300), "values") * torch.logspace(-20, 20, 300)
    generator = torch.Generator().manual_seed(0)
    rounded = torch.stack([round_stochastically(values, generator).float() for _ in range(400)])
    # The upper half of a float32 is a bfloat16.
    lower = (values.view(torch.int32) >> 16 << 16).view(torch.float32)
    upper = ((values.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    assert ((rounded == lower) | (rounded == upper)).all()
    # Each result is off by up to 2^-7; the mean is over 400 results for each of 60,000 values.
    assert ((rounded.mean(0) - values) / values.abs()).mean().abs() < 1e-5
    representable = values.to(torch.bfloat16)
    assert torch.equal(round_stochastically(representable.float(), generator), representable)


def descend(dtype: torch.dtype, stochastic: bool) -> tuple[float, float]:
    """Trains weights of about 0.02 for 200 AdamW steps of 1e-5, towards targets at a distance of 1e-3.

    Returns the fraction of weights that have changed, and the final loss divided by the initial one.
    """
    start = (0.02 * normal((128, 128), "start")).to(torch.bfloat16)
    target = start.float() + 1e-3 * normal((128, 128), "goal").sign()
    parameter = nn.Parameter(start.to(dtype, copy=True))
    settings = AdamW(lr=1e-5, weight_decay=0.0)
    optimizer = settings.build([parameter], seed=0) if stochastic else settings.create([parameter])

    def loss() -> torch.Tensor:
        return (parameter.float() - target).square().sum()

    initial_loss = loss().item()
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return (parameter != start).float().mean().item(), loss().item() / initial_loss


def test_stochastic_rounding_keeps_small_updates_of_bfloat16_weights():
    _, remaining_loss = descend(torch.float32, stochastic=False)
    assert remaining_loss < 0.001
    changed, remaining_loss = descend(torch.bfloat16, stochastic=False)
    assert changed < 0.2 and remaining_loss > 0.8
    changed, remaining_loss = descend(torch.bfloat16, stochastic=True)
    assert changed > 0.999 and remaining_loss < 0.01


def make_bfloat16_parameters() -> list[nn.Parameter]:
    return [nn.Parameter(normal(shape, "weight", shape).to(torch.bfloat16)) for shape in ((64, 8), (5,), (3, 2, 2))]


def update(parameters: list[nn.Parameter], optimizer: StochasticRounding, steps: range) -> None:
    """Updates the parameters with random gradients; the second one has no gradient in odd steps."""
    for step in steps:
        for i, parameter in enumerate(parameters):
            gradient = normal(tuple(parameter.shape), step, i).to(torch.bfloat16)
            parameter.grad = None if i == 1 and step % 2 else gradient
        optimizer.step()
        assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize(
    "settings",
    [AdamW(lr=1e-3), AdamW8bit(lr=1e-3, min_8bit_size=16), SGD(lr=1e-2)],
    ids=lambda settings: type(settings).__name__,
)
def test_stochastic_rounding_resumes_bit_for_bit(settings: Optimizer, monkeypatch: pytest.MonkeyPatch):
    uninterrupted = make_bfloat16_parameters()
    update(uninterrupted, settings.build(uninterrupted, seed=3), range(6))
    interrupted = make_bfloat16_parameters()
    optimizer = settings.build(interrupted, seed=3)
    update(interrupted, optimizer, range(3))
    state, resumed = optimizer.state_dict(), [nn.Parameter(parameter.detach().clone()) for parameter in interrupted]
    # The result does not depend on how many tensors are updated at a time.
    monkeypatch.setattr(stochastic_rounding, "MAX_FLOAT32_ENTRIES", 1)
    optimizer = settings.build(resumed, seed=3)
    optimizer.load_state_dict(state)
    update(resumed, optimizer, range(3, 6))
    for expected, parameter in zip(uninterrupted, resumed, strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, expected)
    other_seed = make_bfloat16_parameters()
    update(other_seed, settings.build(other_seed, seed=4), range(6))
    assert not torch.equal(other_seed[0], uninterrupted[0])


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
def test_default_learning_rate_depends_on_model_method_and_optimizer(
    run: Run, settings: Optimizer, method: Method, rate: float
):
    assert resolve(replace(run, optimizer=settings, method=method)).optimizer.lr == rate


def test_every_optimizer_option_composes_to_its_defaults():
    register()
    for name, kind in GROUPS["optimizer"].items():
        composed = compose_config([f"optimizer={name}"]).optimizer
        assert OmegaConf.to_object(composed) == kind(), name


def library_factors(name: str, warmup: int, steps: int, **options: Any) -> list[float]:
    """Returns the factors of a schedule of diffusers or transformers for its steps 0 .. `steps`."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedules = {
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
    (factor,) = schedules[name]().lr_lambdas
    return [factor(step) for step in range(steps + 1)]


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("schedule", "name", "options"),
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
def test_schedules_equal_those_of_diffusers_and_transformers(
    schedule: LRScheduler, name: str, options: dict[str, Any], warmup: int
):
    steps, schedule = 60, replace(schedule, warmup=warmup)
    expected = library_factors(name, warmup, steps, **options)
    factors = [schedule.factor(step, steps) for step in range(1, steps + 1)]
    # The warm-up of the libraries starts with a step of rate 0; ours is one step ahead until both reach the full rate.
    assert factors[:warmup] == pytest.approx(expected[1 : warmup + 1])
    assert factors[warmup:] == pytest.approx(expected[warmup:steps], abs=1e-12)


EACH_SCHEDULE = pytest.mark.parametrize("kind", GROUPS["lr_scheduler"].values(), ids=lambda kind: kind.__name__)


@EACH_SCHEDULE
def test_schedules_continue_after_a_warmup_and_depend_on_the_step_alone(kind: type[LRScheduler]):
    """So a run resumes with the rate that it would have had."""
    schedule = kind(warmup=10)
    factors = [schedule.factor(step, 50) for step in range(1, 51)]
    assert factors[:10] == sorted(factors[:10]) and factors[0] > 0
    assert factors[10] == pytest.approx(1, abs=0.01) and all(0 <= factor <= 1 for factor in factors)
    again = kind(warmup=10)
    assert [again.factor(step, 50) for step in range(50, 0, -1)] == factors[::-1]


@EACH_SCHEDULE
def test_schedules_end_near_their_floor_and_never_go_below(kind: type[LRScheduler]):
    schedule = kind(min_ratio=0.1)
    factors = [schedule.factor(step, 500) for step in range(1, 501)]
    assert factors[0] == 1
    assert min(factors) >= 0.1
    is_constant = set(factors) == {1}
    assert is_constant or factors[-1] == pytest.approx(0.1, abs=0.005)


def test_restarts_begin_at_the_full_learning_rate():
    factors = [CosineRestarts(cycles=4).factor(step, 400) for step in range(1, 401)]
    assert [index for index, factor in enumerate(factors) if factor == 1] == [0, 100, 200, 300]


@pytest.mark.parametrize(
    ("schedule", "remedy"),
    [
        (CosineRestarts(cycles=0), "1 or more"),
        (CosineRestarts(cycles=9, warmup=2), "type fewer"),
        (Polynomial(power=0.0), "lr_scheduler=constant"),
        (Linear(warmup=10), "0 to 9"),
        (Linear(min_ratio=1.5), "from 0 to 1"),
    ],
    ids=str,
)
def test_invalid_schedules_are_refused(schedule: LRScheduler, remedy: str):
    with pytest.raises(UsageError, match=remedy):
        schedule.check(10)


# The program


def test_effective_learning_rate_is_logged(run: Run, tmp_path: Path):
    command = [
        *("model=flux_kontext", f"model.path={run.model.path}", "model.text_length=8", "dataset.resolution=32"),
        *("dataset.pairs=3", "dataset.held_out=1", "evaluation.images=1", "sample.steps=1", "tracking=none"),
        *("hardware=cpu", "method.rank=2", "optimizer=prodigy", "optimizer.d0=1e-4", "lr_scheduler=linear"),
        *("steps=3", "batch=2", f"out={tmp_path}"),
    ]
    assert main(command) == 0
    (journal,) = tmp_path.glob("*/journal.jsonl")
    values = [record["values"] for _, record in read_records(journal) if "train/lr" in record.get("values", {})]
    assert [value["train/lr"] for value in values] == pytest.approx([1, 2 / 3, 1 / 3])
    assert values[0]["train/lr_effective"] == pytest.approx(1e-4)


def test_bitsandbytes_is_imported_on_demand_and_without_the_hub(tmp_path: Path):
    """In a subprocess with a module `kernels` that records its use.

    On CPUs without AVX512_BF16, bitsandbytes would not ask for a kernel in any case.
    """
    (tmp_path / "kernels.py").write_text(
        "def get_kernel(*_, **__):\n"
        "    import pathlib\n"
        "    pathlib.Path(__file__).with_name('used').touch()\n"
        "    raise OSError\n"
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
    assert not (tmp_path / "used").exists()
