"""Numeric precision of whole networks: predictions, gradients, loss scaling and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from least_squares import train
from omegaconf import OmegaConf
from quantized_networks import assert_equal_predictions_and_gradients, copy_dequantized_weights, predict
from synthetic import DEVICE, normal
from torch import nn

from trainer.__main__ import main
from trainer.config import rules
from trainer.config.compose import compose_config, to_run
from trainer.config.groups import option_names
from trainer.config.identity import run_id
from trainer.config.schema import Run
from trainer.core.dtypes import Dtype
from trainer.core.errors import UsageError
from trainer.hardware import Card
from trainer.method import Method
from trainer.method.full import Full
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model.flux_kontext import FluxKontext
from trainer.precision import Precision, Storage
from trainer.precision.eight_bit import dequantize_fp8, multiply_fp8, quantize_fp8
from trainer.precision.loss_scale import LossScale
from trainer.precision.quantized_linear import QuantizedLinear
from trainer.tracking.journal import read_records
from trainer.training.build import build_network, check_buildable, describe_precision
from trainer.training.checkpoint import Checkpoints

PRECISIONS = [
    Precision(storage, compute)
    for storage, computes in {
        Storage.fp32: (Dtype.float32, Dtype.bfloat16),
        Storage.bf16: (Dtype.bfloat16,),
        Storage.fp16: (Dtype.float16, Dtype.bfloat16),
        Storage.fp8: (Dtype.float32, Dtype.bfloat16, Dtype.float16),
        Storage.int8: (Dtype.float32, Dtype.bfloat16),
        Storage.nf4: (Dtype.float32, Dtype.bfloat16),
        Storage.fp4: (Dtype.float16,),
    }.items()
    for compute in computes
]
PRECISIONS.append(Precision(Storage.fp8, Dtype.bfloat16, float8_products=True))
FP8 = Precision(Storage.fp8, Dtype.bfloat16)
QUANTIZED = [Storage.fp8, Storage.int8, Storage.nf4, Storage.fp4]
MAX_ERROR = {Storage.fp8: 0.03, Storage.int8: 0.02, Storage.nf4: 0.08, Storage.fp4: 0.1}
"""Largest relative error of a prediction."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A LoRA run on a tiny checkpoint, in float32."""
    torch.set_num_threads(1)
    settings = FluxKontext.save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return to_run(compose_config(["model=flux_kontext", "method.rank=2", *settings]))


# Networks


def test_weights_are_quantized_before_adapters_are_attached(run: Run):
    quantized, plain = build_network(replace(run, precision=FP8), DEVICE), build_network(run, DEVICE)
    adapted = [module for module in quantized.modules() if hasattr(module, "lora_A")]
    assert adapted and all(isinstance(module.base_layer, QuantizedLinear) for module in adapted)
    # In the other order, the adapters would be quantized or rounded to 16 bits.
    parameters, expected = trainable_parameters(quantized), trainable_parameters(plain)
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[name])


def test_norms_embeddings_and_outer_layers_are_not_quantized(run: Run):
    network = build_network(replace(run, precision=FP8), DEVICE)
    unquantized = {
        name.partition(".")[0]
        for name, module in network.named_modules()
        if type(module) is nn.Linear and "lora_" not in name
    }
    assert unquantized == {"x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"}
    assert isinstance(network.single_transformer_blocks[0].proj_out, QuantizedLinear)
    others = [p for p in network.parameters() if not p.requires_grad and p.is_floating_point()]
    assert others and all(parameter.dtype == torch.bfloat16 for parameter in others)


@pytest.mark.parametrize(
    "precision", PRECISIONS, ids=lambda p: f"{p.storage.name}-{p.compute.name}{'-float8' * p.float8_products}"
)
def test_prediction_is_near_that_of_float32_and_adapters_get_gradients(run: Run, precision: Precision):
    expected = predict(run, build_network(run, DEVICE))
    run = replace(run, precision=precision)
    network = build_network(run, DEVICE)
    prediction = predict(run, network)
    error = ((prediction - expected).norm() / expected.norm()).item()
    assert error < (0.06 if precision.float8_products else MAX_ERROR.get(precision.storage, 0.02))
    prediction.square().mean().backward()
    for parameter in network.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        else:
            assert parameter.grad is None


def test_full_fine_tuning_loads_weights_in_float32(run: Run):
    run = replace(run, method=Full(), precision=Precision(Storage.bf16, Dtype.bfloat16))
    network, expected = build_network(run, DEVICE), run.model.load_network(torch.float32, DEVICE)
    for name, parameter in expected.named_parameters():
        assert torch.equal(network.get_parameter(name), parameter)


@pytest.mark.parametrize("storage", QUANTIZED, ids=lambda storage: storage.name)
def test_adapters_on_quantized_layers_get_the_gradients_of_dequantized_ones(run: Run, storage: Storage):
    quantized = build_network(replace(run, precision=Precision(storage, Dtype.float32)), DEVICE)
    plain = build_network(run, DEVICE)
    with torch.no_grad():
        for name, parameter in trainable_parameters(quantized).items():
            parameter.copy_(0.1 * normal(tuple(parameter.shape), name))
    copy_dequantized_weights(quantized, plain)
    assert_equal_predictions_and_gradients(partial(predict, run), quantized, plain)


def test_gradient_checkpointing_changes_no_gradient_of_a_quantized_network(run: Run):
    gradients = []
    for checkpointing in (False, True):
        hardware = replace(run.hardware, gradient_checkpointing=checkpointing)
        quantized_run = replace(run, precision=Precision(Storage.fp8, Dtype.float32), hardware=hardware)
        network = build_network(quantized_run, DEVICE).train()
        predict(quantized_run, network).square().mean().backward()
        gradients.append([parameter.grad for parameter in trainable_parameters(network).values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-6, atol=1e-9)


# The default


@pytest.mark.parametrize("model", option_names("model"))
def test_default_precision_is_the_one_that_the_model_suggests(model: str):
    method = OmegaConf.get_type(compose_config([f"model={model}"]).model).methods[0]
    lines = [f"model={model}", f"method={method}"]
    lines += [f"{key}=folder" for key in OmegaConf.missing_keys(compose_config(lines))]
    expected = "fp32" if model in ("mini_kontext", "sd15") else "bf16"
    default, typed = to_run(compose_config(lines)), to_run(compose_config([*lines, f"precision={expected}"]))
    assert default.precision == typed.precision
    assert run_id(default) == run_id(typed)
    assert describe_precision(default).startswith(f"{expected}, the model's default: ")
    other = to_run(compose_config([*lines, "precision=fp8"]))
    assert describe_precision(other).startswith("fp8: ")


def test_default_precision_does_not_depend_on_the_card():
    lines = ["model=flux_kontext", "hardware=t4"]
    with pytest.raises(UsageError, match="T4 cannot train in bfloat16; type precision=fp16$"):
        to_run(compose_config(lines))
    assert to_run(compose_config([*lines, "precision=fp16"])).precision == Precision(Storage.fp16, Dtype.float16)


def test_description_says_where_float8_numbers_are_multiplied():
    lines = ["hardware=h100", "precision=fp8"]
    assert "in float8" not in describe_precision(to_run(compose_config(lines)))
    assert "in float8" in describe_precision(to_run(compose_config([*lines, "precision.float8_products=true"])))


def test_parts_of_the_default_precision_can_be_typed():
    assert to_run(compose_config(["precision.compute=bfloat16"])).precision == Precision(Storage.fp32, Dtype.bfloat16)
    run = to_run(compose_config(["model=flux_kontext", "precision.storage=fp8"]))
    assert run.precision == Precision(Storage.fp8, Dtype.bfloat16)


# Products of float8 numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_product_is_that_of_the_rounded_numbers(dtype: torch.dtype):
    codes, scale = quantize_fp8(normal((48, 64), "weight"))
    x = normal((2, 5, 64), "x").to(dtype)
    # One large row must not cost the others precision.
    x[0, 0] *= 1000
    row_scale = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-24)
    rounded = (x.float() / row_scale).to(torch.float8_e4m3fn).float() * row_scale
    expected = rounded @ dequantize_fp8(torch.float32, codes, scale).T
    tolerance = 1e-5 if dtype is torch.float32 and DEVICE.type == "cpu" else 0.01
    product = multiply_fp8(x.to(DEVICE), codes.to(DEVICE), scale.to(DEVICE))
    assert product.dtype == dtype
    torch.testing.assert_close(product.float().cpu(), expected, rtol=tolerance, atol=tolerance * 10)


def test_a_scale_for_each_row_is_more_exact_than_one_for_all():
    x = normal((64, 64), "x") * torch.logspace(-3, 3, 64)[:, None]
    codes, scale = quantize_fp8(torch.eye(64))

    def error(product: torch.Tensor) -> float:
        return ((product - x).norm(dim=1) / x.norm(dim=1)).mean().item()

    largest = x.abs().max() / 448
    assert 3 * error(multiply_fp8(x, codes, scale)) < error((x / largest).to(torch.float8_e4m3fn).float() * largest)


def test_float8_products_change_only_the_forward_pass(run: Run):
    layers = {}
    for products in (False, True):
        precision = replace(FP8, compute=Dtype.float32, float8_products=products)
        quantizer = precision.quantizer((), DEVICE)
        weights = {"layer.weight": normal((32, 16), "w"), "layer.bias": normal((32,), "b")}
        layers[products] = quantizer("layer", nn.Linear(16, 32), weights.__getitem__)
    results = {}
    for products, layer in layers.items():
        x = normal((3, 16), "x").to(DEVICE).requires_grad_()
        y = layer(x)
        y.backward(normal((3, 32), "gradient").to(DEVICE))
        results[products] = y.detach(), x.grad
    assert not torch.equal(results[True][0], results[False][0])
    torch.testing.assert_close(results[True][0], results[False][0], rtol=0.1, atol=0.2)
    assert torch.equal(results[True][1], results[False][1])


@pytest.mark.parametrize("card", ["t4", "rtx3090", "a100_40g", "m2_max"])
def test_float8_products_are_refused_on_cards_without_them(card: str):
    lines = [f"hardware={card}", "precision=fp8", "precision.compute=float32"]
    assert not to_run(compose_config(lines)).precision.float8_products
    with pytest.raises(UsageError, match="cannot multiply float8 numbers; leave it out"):
        to_run(compose_config([*lines, "precision.float8_products=true"]))
    with pytest.raises(UsageError, match="type precision=fp8"):
        to_run(compose_config(["precision=bf16", "precision.float8_products=true"]))


# Refusals


@pytest.mark.parametrize(
    ("precision", "method", "remedy"),
    [
        (Precision(Storage.bf16, Dtype.float32), Lora(alpha=1.0), "precision=fp32, or precision.compute=bfloat16"),
        (Precision(Storage.fp16, Dtype.float32), Lora(alpha=1.0), "precision=fp32, or precision.compute=float16"),
        (Precision(Storage.fp8, Dtype.float32), Full(), "method=lora, or precision=fp32"),
        *(
            (Precision(storage, Dtype.bfloat16), Full(), "method=lora, or precision=bf16")
            for storage in (*QUANTIZED, Storage.native)
        ),
    ],
)
def test_impossible_precision_is_refused_with_what_to_type(run: Run, precision: Precision, method: Method, remedy: str):
    with pytest.raises(UsageError, match=f"type {remedy}"):
        rules.check(replace(run, precision=precision, method=method))


def test_missing_init_from_is_refused_before_weights_are_read(run: Run, tmp_path: Path):
    new_run = replace(run, method=replace(run.method, init_from="no-such-run"), out=str(tmp_path))
    with pytest.raises(UsageError, match="neither no-such-run nor"):
        check_buildable(new_run)
    # A run with a checkpoint does not need initial weights.
    check_buildable(new_run, is_new=False)


# The loss scale


def test_loss_scale_changes_no_digit():
    plain = train(steps=4, momentum=0.9, decay=0.9)
    scaled = train(steps=4, momentum=0.9, decay=0.9, loss_scale=LossScale())
    assert plain.steps == scaled.steps
    for unscaled, values in ((plain.weights, scaled.weights), (plain.averages, scaled.averages)):
        assert all(map(torch.equal, unscaled, values))


def test_step_with_overflow_updates_nothing_and_halves_the_scale():
    scale = LossScale(value=4096.0)
    result = train(steps=4, momentum=0.9, decay=0.9, loss_scale=scale, overflow_at=(2, 3))
    assert [step.number for step in result.steps] == [1, 2, 3, 4]
    assert [math.isfinite(step.grad_norm) for step in result.steps] == [True, False, False, True]
    assert all(math.isfinite(step.loss) for step in result.steps)
    for values in (result.weights, result.averages):
        assert torch.equal(values[0], values[1]) and torch.equal(values[1], values[2])
    assert not torch.equal(result.weights[2], result.weights[3])
    assert (scale.value, scale.since) == (1024.0, 1)


def test_loss_scale_doubles_after_2000_steps_without_overflow():
    scale = LossScale(value=2.0)
    for _ in range(1999):
        scale.update(finite=True)
    assert scale.value == 2
    scale.update(finite=True)
    assert (scale.value, scale.since) == (4, 0)


def test_nonfinite_gradients_at_scale_one_are_reported():
    scale = LossScale(value=1.0)
    result = train(steps=4, momentum=0.9, loss_scale=scale, overflow_at=(2,), max_gradient=0.0)
    assert [step.finite for step in result.steps] == [True, False, True, True]
    assert torch.equal(result.weights[0], result.weights[1])
    assert scale.value == 1


def test_only_float16_products_have_a_loss_scale():
    assert {precision.compute for precision in PRECISIONS if precision.loss_scale()} == {Dtype.float16}
    precision = Precision(Storage.fp16, Dtype.float16)
    assert precision.loss_scale({"value": 8.0, "since": 3}) == LossScale(8.0, 3)


def test_float16_run_resumes_bit_for_bit_with_its_loss_scale(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # float16 works on a CPU; it is refused because it is slow.
    monkeypatch.setattr(rules, "detect_card", lambda device: Card(name="CPU", float16=True))
    command = [
        *("model=flux_kontext", f"model.path={run.model.path}", "model.text_length=8", "method.rank=2"),
        *("dataset.resolution=32", "dataset.pairs=4", "dataset.held_out=1", "batch=2", "save.every=1"),
        *("precision=fp16", "hardware.device=cpu", "lr_scheduler=constant", "tracking=none"),
        *("evaluation.images=1", "evaluation.samples=1", "sample.steps=1"),
    ]

    def train_to(steps: int, out: Path, *overrides: str) -> Path:
        """Returns the folder of the run."""
        before = set(out.glob("*/checkpoints"))
        assert main([*command, f"out={out}", f"steps={steps}", *overrides]) == 0
        (checkpoints,) = set(out.glob("*/checkpoints")) - before
        return checkpoints.parent

    whole_run = train_to(4, tmp_path / "whole")
    first_half = train_to(2, tmp_path / "parts")
    second_half = train_to(4, tmp_path / "parts", f"resume={first_half}")
    whole, parts = (Checkpoints(folder / "checkpoints", 9).load(4) for folder in (whole_run, second_half))
    assert whole.state["loss_scale"] == parts.state["loss_scale"]
    assert all(torch.equal(whole.weights[name], parts.weights[name]) for name in whole.weights)
    values = [record.get("values", {}) for _, record in read_records(whole_run / "journal.jsonl")]
    logged = [value["train/loss_scale"] for value in values if "train/loss" in value]
    assert logged[-1] == whole.state["loss_scale"]["value"]
