"""Training methods: initial values, merging, starting from other adapters, bfloat16 weights, and resuming."""

from __future__ import annotations

import dataclasses
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import program
import pytest
import torch
from quantized_networks import assert_equal_predictions_and_gradients, copy_dequantized_weights
from torch.nn import functional

from trainer.config.groups import GROUPS, option_name
from trainer.config.schema import Run
from trainer.config.sections import Export, Format
from trainer.core import tensor_files
from trainer.core.batch import Batch
from trainer.core.dtypes import Dtype
from trainer.core.errors import DataError, UsageError
from trainer.core.rng import normal
from trainer.export.write import write_exports
from trainer.method import Method
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
from trainer.optimizer.adamw import AdamW
from trainer.precision import Precision, Storage
from trainer.training.average import update_moving_average
from trainer.training.build import load_initial_weights
from trainer.training.loop import TrainingLoop

CPU = torch.device("cpu")
BF16 = Precision(Storage.bf16, Dtype.bfloat16)
LORA, DORA, LOHA, LOKR = ADAPTERS = [kind(rank=2, alpha=4.0) for kind in (Lora, Dora, Loha, Lokr)]


def class_name(settings: object) -> str:
    return type(settings).__name__


EACH_ADAPTER = pytest.mark.parametrize("method", ADAPTERS, ids=class_name)
EACH_ADAPTER_AND_INIT = pytest.mark.parametrize(
    "method", [*ADAPTERS, Lokr(rank=2, alpha=4.0, init=LokrInit.lycoris)], ids=class_name
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """One family is enough here: test_export and test_families test methods with all of them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    FluxKontext.save_tiny_checkpoint(folder)
    return FluxKontext(path=str(folder), text_length=8)


def make_run(family: Family, method: Method, *formats: Format, precision: Precision | None = None) -> Run:
    return Run(model=family, method=method, precision=precision or Precision(), export=Export(list(formats)))


def build_network(run: Run, deviation: float = 0.0) -> torch.nn.Module:
    """Returns the run's network, with normal numbers of this standard deviation added to the trainable parameters."""
    quantize = run.precision.quantizer(run.model.unquantized_modules, CPU)
    network = run.model.load_network(run.method.dtype(run.precision.dtype()), CPU, quantize)
    run.method.attach(network, run.model.target_modules, seed=0)
    return randomize(network, deviation).eval()


def randomize(network: torch.nn.Module, deviation: float) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in trainable_parameters(network).items():
            parameter.add_(deviation * normal(tuple(parameter.shape), name))
    return network


def predict(run: Run, network: torch.nn.Module) -> torch.Tensor:
    """Returns the prediction of the network for a fixed input."""
    shapes = run.model.shapes(32, 48, ((32, 48),) if 1 in run.model.control_counts else ())
    batch = {name: normal(shape, name)[None] for name, shape in shapes.items()}
    with run.precision.autocast(CPU):
        return run.model.predict(network, batch.pop("latents"), torch.tensor([0.4]), batch).float()


def export(run: Run, network: torch.nn.Module, folder: Path) -> Path:
    weights = {name: parameter.detach().clone() for name, parameter in trainable_parameters(network).items()}
    (path,) = write_exports(run, network, weights, folder)
    return path


# Adapters


@pytest.mark.parametrize("precision", [Precision(), BF16, Precision(Storage.nf4, Dtype.bfloat16)])
@EACH_ADAPTER_AND_INIT
def test_adapter_starts_as_noop_and_trains_in_float32(family: Family, method: Adapter, precision: Precision):
    run = make_run(family, method, precision=precision)
    network = build_network(run)
    plain = family.load_network(precision.dtype(), CPU, precision.quantizer(family.unquantized_modules, CPU))
    atol = 0.0
    if isinstance(method, Dora):
        atol = 1e-6 if precision == Precision() else 0.01
    torch.testing.assert_close(predict(run, network), predict(run, plain), rtol=0, atol=atol)
    assert is_noop(network)
    parameters = trainable_parameters(network)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    network.train()
    predict(run, network).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters.values())
    assert any(parameter.grad.any() for parameter in parameters.values())
    assert all(parameter.grad is None for name, parameter in network.named_parameters() if name not in parameters)


@pytest.mark.parametrize("precision", [Precision(), BF16, Precision(Storage.fp8, Dtype.bfloat16)])
def test_dora_magnitudes_start_at_the_norms_of_the_frozen_weights(family: Family, precision: Precision):
    network = build_network(make_run(family, DORA, precision=precision))
    for _, layer, adapter_name in adapted_layers(network):
        expected = torch.linalg.norm(layer.get_base_layer().weight.float(), dim=1)
        assert torch.equal(layer.lora_magnitude_vector[adapter_name].weight, expected)


@EACH_ADAPTER_AND_INIT
def test_adapter_on_quantized_layers_acts_like_on_dequantized_ones(family: Family, method: Adapter):
    run = make_run(family, method)
    quantized = build_network(make_run(family, method, precision=Precision(Storage.nf4, Dtype.float32)), 0.1)
    plain = build_network(run)
    copy_dequantized_weights(quantized, plain)
    assert_equal_predictions_and_gradients(partial(predict, run), quantized, plain, rtol=1e-3)


@pytest.mark.parametrize(
    "method",
    [Loha(rank=2, alpha=2.0, rank_dropout=0.5), Lokr(rank=2, alpha=2.0, module_dropout=0.5)],
    ids=["rank_dropout", "module_dropout"],
)
def test_dropout_follows_the_seed_and_is_off_in_evaluation(family: Family, method: Adapter):
    run = make_run(family, method)
    network = build_network(run, 0.3)
    with torch.no_grad():
        without_dropout = predict(run, network)
        network.train()
        predictions = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            predictions.append(predict(run, network))
        assert torch.equal(predictions[0], predictions[1])
        assert not torch.equal(predictions[0], predictions[2])
        assert not torch.equal(predictions[0], without_dropout)
        network.eval()
        assert torch.equal(predict(run, network), without_dropout)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"rank": 0}, "method.rank=16"),
        ({"rank_dropout": 1.0}, "method.rank_dropout=0.1"),
        ({"module_dropout": -0.1}, "method.module_dropout=0.1"),
        ({"decompose_factor": 0}, "-1 for one near the square root"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], remedy: str):
    with pytest.raises(UsageError, match=remedy):
        Lokr(**settings)


@EACH_ADAPTER
def test_adapters_of_convolutions_can_be_merged(method: Adapter):
    torch.manual_seed(0)
    network = torch.nn.Sequential()
    network.add_module("conv", torch.nn.Conv2d(4, 6, 3, padding=1))
    network.add_module("point", torch.nn.Conv2d(6, 8, 1, stride=2))
    dataclasses.replace(method, targets=["conv", "point"]).attach(network, (), seed=0)
    x = normal((2, 4, 8, 8), "x")
    assert is_noop(network)
    randomize(network, 0.3).eval()
    with torch.no_grad():
        conv, point = (merged_tensor(network, f"{name}.weight") for name in ("conv", "point"))
        hidden = functional.conv2d(x, conv, network.conv.base_layer.bias, padding=1)
        expected = functional.conv2d(hidden, point, network.point.base_layer.bias, stride=2)
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-4)
    assert not is_noop(network)


def test_every_adapter_is_an_option_with_its_own_settings_class():
    assert set(GROUPS["method"]) >= {"lora", "dora", "loha", "lokr", "full"}
    assert len({option_name(kind()) for kind in (Lora, Dora, Loha, Lokr, Full)}) == 5


# Starting from another adapter


@pytest.mark.parametrize(
    ("method", "format"),
    [
        (LORA, Format.diffusers),
        (LORA, Format.comfyui),
        (LORA, Format.peft),
        (DORA, Format.diffusers),
        (DORA, Format.peft),
        (LOHA, Format.comfyui),
        (LOHA, Format.peft),
        (LOKR, Format.comfyui),
        (LOKR, Format.peft),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else class_name(value),
)
def test_run_starts_with_the_effect_of_its_source_adapter(
    family: Family, method: Adapter, format: Format, tmp_path: Path
):
    source_run = make_run(family, dataclasses.replace(method, alpha=8.0), format)
    source = build_network(source_run, 0.3)
    path = export(source_run, source, tmp_path)
    # With another alpha the weights differ, but the update is the same.
    run = make_run(family, dataclasses.replace(method, alpha=2.0, init_from=str(path)))
    network = build_network(run)
    assert is_noop(network)
    load_initial_weights(run, network)
    outputs, expected = probe_outputs(network), probe_outputs(source)
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predict(run, network), predict(source_run, source), rtol=0, atol=1e-5)


@EACH_ADAPTER
@pytest.mark.parametrize("layer_name", ["lycoris_{}", "lora_unet_{}"])
def test_adapters_with_the_names_of_other_trainers_are_read(
    family: Family, method: Adapter, layer_name: str, tmp_path: Path
):
    tensor_names = {
        "lora_A.weight": "lora_down.weight",
        "lora_B.weight": "lora_up.weight",
        "lora_magnitude_vector.weight": "dora_scale",
    }
    # LyCORIS ignores the alpha of LoKr layers without a low-rank factor, so alpha / rank is 1 here.
    alpha = 2.0 if isinstance(method, Lokr) else 4.0
    source_run = make_run(family, dataclasses.replace(method, alpha=alpha))
    source = build_network(source_run, 0.3)
    tensors = {}
    for name, adapter in layer_adapters(source).items():
        prefix = layer_name.format(name.replace(".", "_"))
        tensors |= {f"{prefix}.{tensor_names.get(leaf, leaf)}": tensor for leaf, tensor in adapter.tensors.items()}
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
    tensor_files.save_tensors(tmp_path / "other.safetensors", tensors)
    run = make_run(family, dataclasses.replace(method, init_from=str(tmp_path / "other.safetensors")))
    network = build_network(run)
    load_initial_weights(run, network)
    torch.testing.assert_close(predict(run, network), predict(source_run, source), rtol=0, atol=1e-5)


def test_adapter_that_does_not_fit_is_refused_with_what_to_type(family: Family, tmp_path: Path):
    two_targets, three_targets = ["to_q", "to_out.0"], ["to_q", "to_k", "to_out.0"]
    source_run = make_run(family, Lora(rank=2, alpha=2.0, targets=two_targets), Format.diffusers)
    source = build_network(source_run, 0.3)
    path = export(source_run, source, tmp_path)
    layer = re.escape(next(iter(layer_adapters(source))))
    remedy = r"Type method.targets=\[to_out.0,to_q\]"
    for method, message in (
        (Lora(rank=4, alpha=4.0, targets=two_targets), f"has rank 2.*{layer}.*type method.rank=2"),
        (Lora(rank=2, alpha=2.0, targets=three_targets), rf"only in method.targets \(.*to_k.*{remedy}"),
        (Lora(rank=2, alpha=2.0, targets=["to_q"]), rf"only in init_from \(.*to_out.*{remedy}"),
        (Dora(rank=2, alpha=2.0, targets=two_targets), "holds lora; type method=lora"),
        (Lokr(rank=2, alpha=2.0, targets=two_targets), "holds lora; type method=lora"),
    ):
        run = make_run(family, dataclasses.replace(method, init_from=str(path)))
        network = build_network(run)
        with pytest.raises(UsageError, match=message):
            load_initial_weights(run, network)
        assert is_noop(network)


def test_pickled_adapter_is_refused(family: Family, tmp_path: Path):
    path = tmp_path / "lora.bin"
    torch.save({"to_q.lora_A.weight": torch.zeros(2, 2)}, path)
    run = make_run(family, Lora(rank=2, alpha=2.0, init_from=str(path)))
    with pytest.raises(DataError, match="safetensors, the only format"):
        load_initial_weights(run, build_network(run))


# Full fine-tuning in bfloat16


def test_bfloat16_weights_have_a_float32_average_and_are_exported(family: Family, tmp_path: Path):
    run = make_run(family, Full(master_weights=MasterWeights.none), Format.pipeline, precision=BF16)
    network = build_network(run)
    parameters = trainable_parameters(network)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}
    initial = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    average = [parameter.detach().float().clone() for parameter in parameters.values()]

    def losses(batch: Batch) -> torch.Tensor:
        return predict(run, network).square().mean()[None]

    loop = TrainingLoop(
        parameters=list(parameters.values()),
        losses=losses,
        optimizer=AdamW(lr=1e-3).build(parameters.values(), seed=0),
        learning_rate=lambda step: 1e-3,
        batch_size=1,
        max_grad_norm=1.0,
        seed=0,
        update_average=partial(update_moving_average, average, list(parameters.values()), 0.9),
    )
    for _ in loop.steps((step, [{"x": torch.zeros(1)}]) for step in range(1, 4)):
        pass
    changed = {name for name, parameter in parameters.items() if not torch.equal(parameter, initial[name])}
    assert len(changed) > 0.8 * len(parameters)
    for mean, (name, parameter) in zip(average, parameters.items(), strict=True):
        assert mean.dtype == torch.float32
        assert torch.equal(mean, parameter.float()) == (name not in changed)
    exported = ComponentWeights(export(run, network, tmp_path) / family.denoiser)
    assert all(torch.equal(exported.read(name), parameter) for name, parameter in parameters.items())


def test_export_refuses_bfloat16_weights_that_did_not_train(family: Family, tmp_path: Path):
    run = make_run(family, Full(master_weights=MasterWeights.none), Format.pipeline, precision=BF16)
    with pytest.raises(DataError, match="nothing has changed"):
        export(run, build_network(run), tmp_path)


# Resuming


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> program.Harness:
    return program.Harness(tmp_path_factory.mktemp("harness"))


BF16_FULL = "method=full method.master_weights=none precision=bf16 optimizer.lr=1e-3"


RESUMED = [
    "method=dora method.rank=2 method.dropout=0.1 precision=nf4 precision.compute=float32",
    "method=lokr method.rank=1 method.rank_dropout=0.2 method.module_dropout=0.2 ema=0.9 "
    "precision=int8 precision.compute=float32",
    f"{BF16_FULL} ema=0.9 export={{formats:[pipeline],dtype:float32}}",
]
SLOW = [
    "method=loha method.rank=2 method.rank_dropout=0.2 ema=0.9 precision=fp4",
    f"{BF16_FULL} optimizer=adamw8bit export.formats=[pipeline]",
]
NOT_LISTED = [
    f"method={name}"
    for name in GROUPS["model"][program.FAMILY].methods
    # tests/test_faults.py kills runs with LoRA.
    if not any(settings.startswith(f"method={name} ") for settings in [*RESUMED, *SLOW, "method=lora "])
]


@pytest.mark.parametrize(
    "settings", [*RESUMED, *NOT_LISTED, *(pytest.param(settings, marks=pytest.mark.slow) for settings in SLOW)]
)
def test_killed_run_resumes_bit_for_bit_with_every_method_and_storage(harness: program.Harness, settings: str):
    out = harness.new_folder()
    # Killed while the checkpoint of step 4 is saved, after that of step 2.
    death = program.at_call("trainer.training.checkpoint:Checkpoints.save", 2, program.raise_signal(signal.SIGKILL))
    assert harness.run(out, *settings.split(), setup=death).code == -signal.SIGKILL
    harness.assert_equals_reference(harness.finish(out, *settings.split()), *settings.split())
