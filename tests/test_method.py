"""What trains: how each method begins, what it changes, where it can begin from, and that it can be stopped."""

from __future__ import annotations

import dataclasses
import re
import signal
from pathlib import Path

import program
import pytest
import torch
from torch.nn import functional

from trainer.config.groups import GROUPS, option_name
from trainer.config.schema import Run
from trainer.config.sections import Export, Format
from trainer.core import tensor_files
from trainer.core.dtypes import Dtype
from trainer.core.errors import DataError, UsageError
from trainer.core.rng import normal
from trainer.export.write import write_exports
from trainer.method.adapter import Adapter
from trainer.method.adapter_layers import adapted_layers, layer_adapters, merged_tensor
from trainer.method.adapter_probe import is_noop, probe_outputs
from trainer.method.dora import Dora
from trainer.method.full import Full, MasterWeights
from trainer.method.loha import Loha
from trainer.method.lokr import Lokr, LokrInit
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model import Family
from trainer.model.flux_kontext import FluxKontext
from trainer.model.weights import ComponentWeights
from trainer.optimizer import stochastic_rounding
from trainer.optimizer.adamw import AdamW
from trainer.optimizer.adamw8bit import AdamW8bit
from trainer.optimizer.sgd import SGD
from trainer.optimizer.stochastic_rounding import round_stochastically
from trainer.precision import Precision, Storage
from trainer.training.build import load_initial_weights
from trainer.training.loop import TrainingLoop

CPU = torch.device("cpu")
ADAPTERS = [
    Lora(rank=2, alpha=4.0),
    Dora(rank=2, alpha=4.0),
    Loha(rank=2, alpha=4.0),
    Lokr(rank=2, alpha=4.0),
    Lokr(rank=2, alpha=4.0, init=LokrInit.lycoris),
]
EACH_ADAPTER = pytest.mark.parametrize("method", ADAPTERS, ids=lambda method: type(method).__name__)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """One for all: what families answer is asked in test_export and test_families."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    FluxKontext.save_tiny_checkpoint(folder)
    return FluxKontext(path=str(folder), text_length=8)


def run_of(family: Family, method: Adapter | Full, *formats: Format, **rooms) -> Run:
    return Run(model=family, export=Export(list(formats)), **{"method": method, "precision": Precision()} | rooms)


def attached(run: Run, size: float | None = None) -> torch.nn.Module:
    """The run's network; where a size is given with adapters of normal numbers."""
    stored = run.precision.quantizer(run.model.unquantized_modules, CPU)
    network = run.model.load_network(run.method.dtype(run.precision.dtype()), CPU, stored)
    run.method.attach(network, run.model.target_modules, seed=0)
    if size is not None:
        with torch.no_grad():
            for name, parameter in trainable_parameters(network).items():
                parameter.add_(size * normal(tuple(parameter.shape), name))
    return network.eval()


def prediction(run: Run, network: torch.nn.Module) -> torch.Tensor:
    spec = run.model.shapes(32, 48, ((32, 48),) if 1 in run.model.control_counts else ())
    rows = {name: normal(shape, name)[None] for name, shape in spec.items()}
    with run.precision.autocast(CPU):
        return run.model.predict(network, rows.pop("latents"), torch.tensor([0.4]), rows).float()


def written(run: Run, network: torch.nn.Module, folder: Path) -> list[Path]:
    weights = {name: parameter.detach().clone() for name, parameter in trainable_parameters(network).items()}
    return write_exports(run, network, weights, folder)


# Adapters


@pytest.mark.parametrize(
    "precision", [Precision(), Precision(Storage.bf16, Dtype.bfloat16), Precision(Storage.nf4, Dtype.bfloat16)]
)
@EACH_ADAPTER
def test_an_adapter_begins_by_changing_nothing_and_trains_in_float32(
    family: Family, method: Adapter, precision: Precision
):
    run = run_of(family, method, precision=precision)
    network = attached(run)
    plain = family.load_network(precision.dtype(), CPU, precision.quantizer(family.unquantized_modules, CPU))
    found, expected = prediction(run, network), prediction(run, plain)
    torch.testing.assert_close(
        found, expected, rtol=0, atol=0 if not isinstance(method, Dora) else 1e-6 if precision == Precision() else 0.01
    )
    assert is_noop(network)
    parameters = trainable_parameters(network)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    network.train()
    prediction(run, network).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters.values())
    assert any(parameter.grad.any() for parameter in parameters.values())
    assert all(parameter.grad is None for name, parameter in network.named_parameters() if name not in parameters)


def test_doras_lengths_begin_at_those_of_the_frozen_weights_whatever_type_these_have(family: Family):
    for precision in (Precision(), Precision(Storage.bf16, Dtype.bfloat16), Precision(Storage.fp8, Dtype.bfloat16)):
        network = attached(run_of(family, ADAPTERS[1], precision=precision))
        for _, layer, active in adapted_layers(network):
            expected = torch.linalg.norm(layer.get_base_layer().weight.float(), dim=1)
            assert torch.equal(layer.lora_magnitude_vector[active].weight, expected)


@EACH_ADAPTER
def test_a_stored_base_is_adapted_as_its_dequantised_weights_are(family: Family, method: Adapter):
    stored = attached(run_of(family, method, precision=Precision(Storage.nf4, Dtype.float32)), 0.1)
    plain = attached(run_of(family, method), 0.1)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            path, _, leaf = name.rpartition(".")
            parameter.copy_(getattr(stored.get_submodule(path), leaf))
    run = run_of(family, method)
    found, expected = prediction(run, stored), prediction(run, plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for output in (found, expected):
        output.square().mean().backward()
    for name, parameter in trainable_parameters(stored).items():
        torch.testing.assert_close(parameter.grad, trainable_parameters(plain)[name].grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "moved"),
    [
        (Loha(rank=2, alpha=2.0, rank_dropout=0.5), "rank_dropout"),
        (Lokr(rank=2, alpha=2.0, module_dropout=0.5), "module_dropout"),
    ],
)
def test_dropout_follows_the_seed_and_is_off_when_nothing_trains(family: Family, method: Adapter, moved: str):
    run = run_of(family, method)
    network = attached(run, 0.3)
    with torch.no_grad():
        whole = prediction(run, network)
        network.train()
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(prediction(run, network))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], whole)
        network.eval()
        assert torch.equal(prediction(run, network), whole)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"rank": 0}, "method.rank=16"),
        ({"rank_dropout": 1.0}, "method.rank_dropout=0.1"),
        ({"module_dropout": -0.1}, "method.module_dropout=0.1"),
        ({"decompose_factor": 0}, "-1 for one near the square root"),
    ],
)
def test_what_no_adapter_can_be_is_refused(settings: dict, remedy: str):
    with pytest.raises(UsageError, match=remedy):
        Lokr(**settings)


@pytest.mark.parametrize("method", ADAPTERS[:4], ids=lambda method: type(method).__name__)
def test_convolutions_are_adapted_and_merged_too(method: Adapter, tmp_path: Path):
    torch.manual_seed(0)
    network = torch.nn.Sequential()
    network.add_module("conv", torch.nn.Conv2d(4, 6, 3, padding=1))
    network.add_module("point", torch.nn.Conv2d(6, 8, 1, stride=2))
    dataclasses.replace(method, targets=["conv", "point"]).attach(network, (), seed=0)
    x = normal((2, 4, 8, 8), "x")
    assert is_noop(network)
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            parameter.add_(0.3 * normal(tuple(parameter.shape), name))
        network.eval()
        conv, point = (merged_tensor(network, f"{name}.weight") for name in ("conv", "point"))
        expected = functional.conv2d(
            functional.conv2d(x, conv, network.conv.base_layer.bias, padding=1), point, network.point.base_layer.bias, 2
        )
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-4)
        assert not is_noop(network)


# Beginning from an adapter

SOURCES = [
    (Lora(rank=2, alpha=8.0), Format.diffusers),
    (Lora(rank=2, alpha=8.0), Format.comfyui),
    (Lora(rank=2, alpha=8.0), Format.peft),
    (Dora(rank=2, alpha=8.0), Format.diffusers),
    (Dora(rank=2, alpha=8.0), Format.peft),
    (Loha(rank=2, alpha=8.0), Format.comfyui),
    (Loha(rank=2, alpha=8.0), Format.peft),
    (Lokr(rank=2, alpha=8.0), Format.comfyui),
    (Lokr(rank=2, alpha=8.0), Format.peft),
]


@pytest.mark.parametrize(
    ("method", "format"), SOURCES, ids=lambda value: value.name if isinstance(value, Format) else type(value).__name__
)
def test_a_run_begins_by_doing_what_the_adapter_it_begins_from_does(
    family: Family, method: Adapter, format: Format, tmp_path: Path
):
    source = run_of(family, method, format)
    network = attached(source, 0.3)
    (path,) = written(source, network, tmp_path)
    # Another alpha: the update is the same all the same.
    run = run_of(family, dataclasses.replace(method, alpha=2.0, init_from=str(path)))
    again = attached(run)
    assert is_noop(again)
    load_initial_weights(run, again)
    expected = probe_outputs(network)
    assert probe_outputs(again).keys() == expected.keys()
    for name, effect in probe_outputs(again).items():
        torch.testing.assert_close(effect, expected[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction(run, again), prediction(source, network), rtol=0, atol=1e-5)


def other_name(leaf: str) -> str:
    """A tensor's name as kohya's scripts and LyCORIS have it."""
    others = {
        "lora_A.weight": "lora_down.weight",
        "lora_B.weight": "lora_up.weight",
        "lora_magnitude_vector.weight": "dora_scale",
    }
    return others.get(leaf, leaf)


@pytest.mark.parametrize("method", ADAPTERS[:4], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("spelling", ["lycoris_{}", "lora_unet_{}"])
def test_an_adapter_of_other_trainers_is_read_by_its_names(
    family: Family, method: Adapter, spelling: str, tmp_path: Path
):
    # LyCORIS takes alpha for nothing where both factors of a LoKr are whole: 1 is the factor of all.
    alpha = 2.0 if isinstance(method, Lokr) else 4.0
    network = attached(run_of(family, dataclasses.replace(method, alpha=alpha)), 0.3)
    tensors = {}
    for name, part in layer_adapters(network).items():
        start = spelling.format(name.replace(".", "_"))
        tensors |= {f"{start}.{other_name(leaf)}": tensor for leaf, tensor in part.tensors.items()} | {
            f"{start}.alpha": torch.tensor(alpha)
        }
    tensor_files.save_tensors(tmp_path / "other.safetensors", tensors)
    run = run_of(family, dataclasses.replace(method, init_from=str(tmp_path / "other.safetensors")))
    again = attached(run)
    load_initial_weights(run, again)
    torch.testing.assert_close(prediction(run, again), prediction(run, network), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused_by_name_with_what_to_type(family: Family, tmp_path: Path):
    source = run_of(family, Lora(rank=2, alpha=2.0, targets=["to_q", "to_out.0"]), Format.diffusers)
    (path,) = written(source, attached(source, 0.3), tmp_path)
    first = next(iter(layer_adapters(attached(source))))
    for method, said in (
        (Lora(rank=4, alpha=4.0, targets=["to_q", "to_out.0"]), f"has rank 2 .*{re.escape(first)}.*type method.rank=2"),
        (
            Lora(rank=2, alpha=2.0, targets=["to_q", "to_k", "to_out.0"]),
            r"only of method.targets \(.*to_k.*Type method.targets=\[to_out.0,to_q\]",
        ),
        (
            Lora(rank=2, alpha=2.0, targets=["to_q"]),
            r"only of init_from \(.*to_out.*Type method.targets=\[to_out.0,to_q\]",
        ),
        (Dora(rank=2, alpha=2.0, targets=["to_q", "to_out.0"]), "holds lora; type method=lora"),
        (Lokr(rank=2, alpha=2.0, targets=["to_q", "to_out.0"]), "holds lora; type method=lora"),
    ):
        run = run_of(family, dataclasses.replace(method, init_from=str(path)))
        network = attached(run)
        with pytest.raises(UsageError, match=said):
            load_initial_weights(run, network)
        assert is_noop(network)


def test_a_pickle_is_no_source_of_weights(family: Family, tmp_path: Path):
    path = tmp_path / "lora.bin"
    torch.save({"to_q.lora_A.weight": torch.zeros(2, 2)}, path)
    run = run_of(family, Lora(rank=2, alpha=2.0, init_from=str(path)))
    with pytest.raises(DataError, match="safetensors, the only kind"):
        load_initial_weights(run, attached(run))


def test_every_method_is_an_option_with_settings_of_its_own():
    assert set(GROUPS["method"]) >= {"lora", "dora", "loha", "lokr", "full"}
    assert len({option_name(kind()) for kind in (Lora, Dora, Loha, Lokr, Full)}) == 5


# Whole weights in bfloat16


def test_stochastic_rounding_gives_one_of_the_two_neighbours_and_the_value_on_average():
    values = normal((200, 300), "values") * torch.logspace(-20, 20, 300)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([round_stochastically(values, generator).float() for _ in range(400)])
    # A bfloat16 is the upper half of a float32.
    low = (values.view(torch.int32) >> 16 << 16).view(torch.float32)
    high = ((values.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    assert ((drawn == low) | (drawn == high)).all()
    # 400 draws of 60,000 values, each off by at most 2^-7.
    assert ((drawn.mean(0) - values) / values.abs()).mean().abs() < 1e-5
    exact = values.to(torch.bfloat16)
    assert torch.equal(round_stochastically(exact.float(), generator), exact)


def descended(how: str) -> tuple[float, float]:
    """200 AdamW steps of 1e-5 from weights of 0.02 towards targets 1e-3 away: the part of the weights that moved at all, and of the loss that is
    left."""
    start = (0.02 * normal((128, 128), "start")).to(torch.bfloat16)
    goal = start.float() + 1e-3 * normal((128, 128), "goal").sign()
    parameter = torch.nn.Parameter(start.float() if how == "float32" else start.clone())
    settings = AdamW(lr=1e-5, weight_decay=0.0)
    optimizer = settings.create([parameter]) if how == "nearest" else settings.build([parameter], seed=0)

    def loss() -> torch.Tensor:
        return (parameter.float() - goal).square().sum()

    before = loss().item()
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return (parameter != start).float().mean().item(), loss().item() / before


def test_small_updates_of_bfloat16_weights_are_lost_to_the_nearest_and_kept_by_chance():
    assert descended("float32")[1] < 0.001
    moved, left = descended("nearest")
    assert moved < 0.2 and left > 0.8
    moved, left = descended("stochastic")
    assert moved > 0.999 and left < 0.01


@pytest.mark.parametrize(
    "optimizer", [AdamW(lr=1e-3), AdamW8bit(lr=1e-3, min_8bit_size=16), SGD(lr=1e-2)], ids=lambda o: type(o).__name__
)
def test_an_optimizer_of_bfloat16_weights_continues_from_its_state_bit_for_bit(
    optimizer, monkeypatch: pytest.MonkeyPatch
):
    def stepped(parameters: list[torch.nn.Parameter], live, steps: range) -> None:
        for step in steps:
            for i, parameter in enumerate(parameters):
                # One of them has no gradient now and then.
                parameter.grad = (
                    None if i == 1 and step % 2 else normal(tuple(parameter.shape), step, i).to(torch.bfloat16)
                )
            live.step()
            assert all(parameter.grad is None for parameter in parameters)

    def fresh() -> list[torch.nn.Parameter]:
        return [
            torch.nn.Parameter(normal(shape, "weight", shape).to(torch.bfloat16))
            for shape in ((64, 8), (5,), (3, 2, 2))
        ]

    whole = fresh()
    stepped(whole, optimizer.build(whole, seed=3), range(6))
    first = fresh()
    live = optimizer.build(first, seed=3)
    stepped(first, live, range(3))
    state, second = live.state_dict(), [torch.nn.Parameter(parameter.detach().clone()) for parameter in first]
    # A turn for each tensor gives the same bits.
    monkeypatch.setattr(stochastic_rounding, "MAX_FLOAT32_ENTRIES", 1)
    live = optimizer.build(second, seed=3)
    live.load_state_dict(state)
    stepped(second, live, range(3, 6))
    assert all(
        one.dtype == torch.bfloat16 and torch.equal(one, other) for one, other in zip(whole, second, strict=True)
    )
    other = fresh()
    stepped(other, optimizer.build(other, seed=4), range(6))
    assert not torch.equal(other[0], whole[0])


def test_whole_weights_without_masters_stay_in_bfloat16_and_their_average_is_in_float32(family: Family, tmp_path: Path):
    run = run_of(
        family,
        Full(master_weights=MasterWeights.none),
        Format.pipeline,
        precision=Precision(Storage.bf16, Dtype.bfloat16),
    )
    network = attached(run)
    parameters = trainable_parameters(network)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = AdamW(lr=1e-3).build(parameters.values(), seed=0)
    average = [parameter.detach().float().clone() for parameter in parameters.values()]

    def losses(rows: dict[str, torch.Tensor]) -> torch.Tensor:
        return prediction(run, network).square().mean()[None]

    batches = ((step, [{"x": torch.zeros(1)}]) for step in range(1, 4))
    loop = TrainingLoop(
        parameters=list(parameters.values()),
        losses=losses,
        optimizer=optimizer,
        learning_rate=lambda step: 1e-3,
        batch_size=1,
        max_grad_norm=1.0,
        seed=0,
        average=average,
        decay=0.9,
    )
    for _ in loop.steps(batches):
        pass
    moved = [name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])]
    assert len(moved) > 0.8 * len(parameters)
    for mean, (name, parameter) in zip(average, parameters.items(), strict=True):
        assert mean.dtype == torch.float32 and torch.equal(mean, parameter.float()) == (name not in moved)
    (path,) = written(run, network, tmp_path)
    read = ComponentWeights(path / family.denoiser).read
    assert all(torch.equal(read(name), parameter) for name, parameter in parameters.items())


def test_bfloat16_weights_that_only_were_rounded_are_no_result(family: Family, tmp_path: Path):
    run = run_of(
        family,
        Full(master_weights=MasterWeights.none),
        Format.pipeline,
        precision=Precision(Storage.bf16, Dtype.bfloat16),
    )
    with pytest.raises(DataError, match="nothing has changed"):
        written(run, attached(run), tmp_path)


# Stopped and continued


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> program.Lab:
    return program.Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize(
    "settings",
    [
        "method=dora method.rank=2 method.dropout=0.1 precision=nf4 precision.compute=float32",
        "method=lokr method.rank=1 method.rank_dropout=0.2 method.module_dropout=0.2 precision=int8 precision.compute=float32 ema=0.9",
        pytest.param("method=loha method.rank=2 method.rank_dropout=0.2 ema=0.9 precision=fp4", marks=pytest.mark.slow),
        "method=full method.master_weights=none precision=bf16 ema=0.9 optimizer.lr=1e-3 export={formats:[pipeline],dtype:float32}",
        pytest.param(
            "method=full method.master_weights=none precision=bf16 optimizer=adamw8bit optimizer.lr=1e-3 export.formats=[pipeline]",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_method_and_storage_continues_as_if_it_had_never_stopped(lab: program.Lab, settings: str):
    out = lab.place()
    # Killed with a checkpoint of step 2 behind it, while step 4 is saved.
    death = program.at("trainer.training.checkpoint:Checkpoints.save", 2, program.to_itself(signal.SIGKILL))
    assert lab.run(out, *settings.split(), before=death).code == -signal.SIGKILL
    lab.assert_as_if_never_stopped(lab.finish(out, *settings.split()), *settings.split())
