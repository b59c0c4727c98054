"""How frozen weights are stored: exactness, gradients, memory, the order of things, scaled losses, what is refused."""

from __future__ import annotations

import gc
import math
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from synthetic import DEVICE, normal
from torch import nn

from trainer.__main__ import main
from trainer.config import rules
from trainer.config.compose import compose_config, to_run
from trainer.config.schema import Run
from trainer.core import files, tensor_files
from trainer.core.dtypes import Dtype
from trainer.core.errors import UsageError
from trainer.core.libraries import import_bitsandbytes
from trainer.hardware import Card
from trainer.method.full import Full
from trainer.method.lora import Lora
from trainer.method.trainable import trainable_parameters
from trainer.model.flux_kontext import FluxKontext
from trainer.model.weights import DIFFUSERS_WEIGHTS, load_weights, on_meta_device
from trainer.precision import Precision, Storage
from trainer.precision.eight_bit import (
    E4M3,
    dequantize_fp8,
    dequantize_int8,
    float8_values,
    quantize_fp8,
    quantize_int8,
)
from trainer.precision.loss_scale import LossScale
from trainer.precision.quantized_linear import QuantizedLinear
from trainer.tracking.journal import read_records
from trainer.training.build import build_network, check_buildable
from trainer.training.checkpoint import Checkpoints
from trainer.training.loop import TrainingLoop

PRECISIONS = [
    Precision(Storage.fp32, Dtype.float32),
    Precision(Storage.fp32, Dtype.bfloat16),
    Precision(Storage.bf16, Dtype.bfloat16),
    Precision(Storage.fp16, Dtype.float16),
    Precision(Storage.fp16, Dtype.bfloat16),
    Precision(Storage.fp8, Dtype.float32),
    Precision(Storage.fp8, Dtype.bfloat16),
    Precision(Storage.fp8, Dtype.float16),
    Precision(Storage.int8, Dtype.float32),
    Precision(Storage.int8, Dtype.bfloat16),
    Precision(Storage.nf4, Dtype.float32),
    Precision(Storage.nf4, Dtype.bfloat16),
    Precision(Storage.fp4, Dtype.float16),
]
QUANTISED = [Storage.fp8, Storage.int8, Storage.nf4, Storage.fp4]
MADE_HERE = pytest.mark.parametrize("storage", QUANTISED, ids=lambda storage: storage.name)
ERROR = {Storage.fp8: 0.03, Storage.int8: 0.02, Storage.nf4: 0.08, Storage.fp4: 0.1}
"""Of a prediction, over its size."""
BYTES = {Storage.fp8: 1, Storage.int8: 1, Storage.nf4: 0.516, Storage.fp4: 0.516}
"""A weight, scales of blocks included, those of rows not."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A LoRA run on a tiny checkpoint, in float32."""
    torch.set_num_threads(1)
    settings = FluxKontext.save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return to_run(compose_config(["model=flux_kontext", "method.rank=2", *settings]))


def prediction(run: Run, network: nn.Module) -> torch.Tensor:
    """What the network makes of a fixed input, (2, 4, 8, 6)."""
    x, control = normal((2, 4, 8, 6), "x"), normal((2, 4, 8, 6), "control")
    cond = {"control": control, "prompt": normal((2, 8, 16), "prompt"), "pooled": normal((2, 16), "pooled")}
    with run.precision.autocast(DEVICE):
        return run.model.predict(network, x, torch.tensor([0.3, 0.7], device=DEVICE), cond).float()


def stored_layer(storage: Storage, linear: nn.Linear) -> QuantizedLinear:
    """A layer as it is stored while a network is read."""
    read = {f"layer.{name}": tensor.detach() for name, tensor in linear.state_dict().items()}
    return Precision(storage).quantizer((), DEVICE)("layer", linear, read.__getitem__)


def test_frozen_weights_take_their_storage_before_adapters_are_attached(run: Run):
    stored, plain = build_network(replace(run, precision=Precision(Storage.fp8, Dtype.bfloat16)), DEVICE), build_network(run, DEVICE)
    adapted = [module for module in stored.modules() if hasattr(module, "lora_A")]
    assert adapted and all(isinstance(module.base_layer, QuantizedLinear) for module in adapted)
    # In the other order the adapters would be quantised, or stand in 16 bits: they are the same as beside float32 weights, bit for bit.
    assert trainable_parameters(stored).keys() == trainable_parameters(plain).keys()
    for name, parameter in trainable_parameters(stored).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, trainable_parameters(plain)[name])


def test_norms_embeddings_and_the_layers_next_to_input_and_output_stay_high(run: Run):
    network = build_network(replace(run, precision=Precision(Storage.fp8, Dtype.bfloat16)), DEVICE)
    high = {
        name.partition(".")[0]
        for name, module in network.named_modules()
        if type(module) is nn.Linear and "lora_" not in name
    }
    assert high == {"x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"}
    assert isinstance(network.single_transformer_blocks[0].proj_out, QuantizedLinear)
    others = [p for p in network.parameters() if not p.requires_grad and p.is_floating_point()]
    assert others and all(parameter.dtype == torch.bfloat16 for parameter in others)


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: f"{p.storage.name}-{p.compute.name}")
def test_every_storage_predicts_what_float32_predicts_and_gives_every_adapter_a_gradient(
    run: Run, precision: Precision
):
    expected = prediction(run, build_network(run, DEVICE))
    ours = replace(run, precision=precision)
    network = build_network(ours, DEVICE)
    found = prediction(ours, network)
    assert ((found - expected).norm() / expected.norm()).item() < ERROR.get(precision.storage, 0.02)
    found.square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in trainable_parameters(network).values()
    )
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


def test_what_trains_as_a_whole_is_loaded_in_float32(run: Run):
    network = build_network(replace(run, method=Full(), precision=Precision(Storage.bf16, Dtype.bfloat16)), DEVICE)
    reference = run.model.load_network(torch.float32, DEVICE)
    for name, parameter in reference.named_parameters():
        assert torch.equal(network.get_parameter(name), parameter)


@pytest.mark.parametrize("deviation", [1e-3, 0.02, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_row_has_its_scale_which_is_exact_in_every_type(deviation: float, dtype: torch.dtype):
    weight = normal((64, 256), "weight", deviation) * deviation * torch.linspace(0.1, 10, 64, device=DEVICE)[:, None]
    stored, scale = quantize_fp8(weight)
    assert stored.dtype == torch.uint8 and stored.shape == weight.shape and scale.shape == (64,)
    found = dequantize_fp8(torch.float32, stored, scale)
    # Three bits behind the point, down to a 2^-14th of a row's largest weight, and even steps below.
    bound = torch.maximum(weight.abs() / 16, weight.abs().amax(1, keepdim=True) * 2**-17)
    assert ((found - weight).abs() <= bound).all()
    assert ((found - weight).norm() / weight.norm()).item() == pytest.approx(0.0265, abs=1e-3)
    if dtype is torch.float16:
        # Its own steps end at 2^-24, of weights in float16 too.
        torch.testing.assert_close(dequantize_fp8(dtype, stored, scale).float(), found, rtol=0, atol=2**-25)
    else:
        assert torch.equal(dequantize_fp8(dtype, stored, scale).float(), found)


def test_a_scale_for_each_row_is_more_exact_than_a_bare_cast():
    for deviation, ratio in ((0.02, 1.2), (0.005, 4.0)):
        weight = normal((256, 256), "weight") * deviation
        bare, ours = weight.to(torch.float8_e4m3fn).float(), dequantize_fp8(torch.float32, *quantize_fp8(weight))
        assert (bare - weight).norm() > ratio * (ours - weight).norm()


def test_rows_of_zeros_and_of_the_smallest_numbers_are_stored():
    weight = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [1e-4, 0.0], [448.0, -1.0], [57344.0, 1e-3]], device=DEVICE)
    found = dequantize_fp8(torch.float16, *quantize_fp8(weight))
    torch.testing.assert_close(found.float(), weight, rtol=1 / 16, atol=0.25)
    assert found[:3].abs().max() == pytest.approx(1e-4, rel=1 / 16)


def test_the_table_for_machines_without_float8_says_what_the_cast_says():
    stored, scale = quantize_fp8(normal((32, 48), "weight"))
    table = float8_values(E4M3).to(DEVICE)
    assert table.shape == (256,) and table[0x7E] == 448 and table[0x7F].isnan()
    assert torch.equal(table[stored.int()].mul(scale[:, None]), dequantize_fp8(torch.float32, stored, scale))


@pytest.mark.parametrize("deviation", [1e-3, 0.02, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_numbers_are_within_half_a_step_of_the_weights_in_every_type(deviation: float, dtype: torch.dtype):
    weight = normal((64, 256), "weight", deviation) * deviation * torch.linspace(0.1, 10, 64, device=DEVICE)[:, None]
    codes, scale = quantize_int8(weight)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.int8, weight.shape, (64,))
    assert codes.abs().amax(1).min() >= 126
    found = dequantize_int8(torch.float32, codes, scale)
    assert ((found - weight).abs() <= 0.501 * scale[:, None]).all()
    # A scale that were rounded again in 16 bits would move a whole row.
    torch.testing.assert_close(
        dequantize_int8(dtype, codes, scale).float(), found, rtol=torch.finfo(dtype).eps, atol=127 * 2**-25
    )


@MADE_HERE
@pytest.mark.parametrize("bias", [True, False])
def test_a_stored_layer_and_its_gradient_are_those_of_its_dequantised_weights(storage: Storage, bias: bool):
    torch.manual_seed(0)
    layer, plain = stored_layer(storage, nn.Linear(48, 32, bias=bias)), nn.Linear(48, 32, bias=bias, device=DEVICE)
    plain.load_state_dict({"weight": layer.weight} | ({"bias": layer.bias} if bias else {}))
    x = normal((2, 5, 48), "x")
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = layer(ours), plain(theirs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for output in (found, expected):
        (output * normal((2, 5, 32), "gradient")).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert all(parameter.grad is None for parameter in layer.parameters())


@MADE_HERE
def test_adapters_on_stored_weights_get_the_gradients_of_adapters_on_the_dequantised_ones(run: Run, storage: Storage):
    stored = build_network(replace(run, precision=Precision(storage, Dtype.float32)), DEVICE)
    plain = build_network(run, DEVICE)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            path, _, leaf = name.rpartition(".")
            # `weight` is no parameter of a stored layer.
            parameter.copy_(getattr(stored.get_submodule(path), leaf))
        for network in (stored, plain):
            for name, parameter in trainable_parameters(network).items():
                parameter.copy_(0.1 * normal(tuple(parameter.shape), name))
    found, expected = prediction(run, stored), prediction(run, plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for output in (found, expected):
        output.square().mean().backward()
    for name, parameter in trainable_parameters(stored).items():
        torch.testing.assert_close(parameter.grad, trainable_parameters(plain)[name].grad, rtol=1e-4, atol=1e-7)


@MADE_HERE
def test_a_stored_layer_computes_in_the_type_of_autocast_and_hands_gradients_back_in_the_type_of_its_input(
    storage: Storage,
):
    layer, x = stored_layer(storage, nn.Linear(16, 8)), normal((4, 16), "x").requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)
    assert layer(x).dtype == torch.float32


@MADE_HERE
def test_nothing_but_codes_and_scales_is_kept_for_the_backward_pass(storage: Storage):
    layer, kept = stored_layer(storage, nn.Linear(256, 256)), []
    x = normal((4, 256), "x").to(torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in layer.quantized_tensors()}
    # Beside the scales of rows (1 KiB) and the tables of bitsandbytes' values (1.1 KiB).
    assert sum(tensor.nbytes for tensor in kept) <= BYTES[storage] * 256**2 + 1200


@pytest.mark.parametrize("storage", [Storage.fp8, Storage.nf4], ids=lambda storage: storage.name)
def test_stored_layers_are_compiled_whole_and_alike_ones_once(storage: Storage):
    layers = [stored_layer(storage, nn.Linear(32, 32)) for _ in range(12)]
    forward = torch.compile(lambda layer, x: layer(x), backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for gradient in (True, False):
        for layer in layers:
            x = normal((4, 32), "x").requires_grad_(gradient)
            torch.testing.assert_close(forward(layer, x), layer(x), rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_layers_are_read_and_stored_one_by_one():
    with on_meta_device():
        network = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)), nn.Linear(32, 4))
    alive, most = weakref.WeakSet(), 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        gc.collect()
        tensor = normal(tuple(network.get_parameter(name).shape), name)
        alive.add(tensor)
        most = max(most, sum(each.nbytes for each in alive))
        return tensor

    precision = Precision(Storage.fp8, Dtype.bfloat16)
    load_weights(network, read, precision.dtype(), DEVICE, precision.quantizer(("2",), DEVICE))
    # Of three layers of 4 KiB never more than one, and a bias, beside those in bfloat16 already.
    assert most <= 32 * 32 * 4 + 32 * 4
    assert [type(network[0]), type(network[1][0]), type(network[2])] == [QuantizedLinear, QuantizedLinear, nn.Linear]
    assert {p.dtype for p in network.parameters()} == {torch.uint8, torch.bfloat16}


def test_checkpointing_changes_no_gradient_of_a_stored_network(run: Run):
    found = []
    for checkpointing in (False, True):
        ours = replace(
            run,
            precision=Precision(Storage.fp8, Dtype.float32),
            hardware=replace(run.hardware, gradient_checkpointing=checkpointing),
        )
        network = build_network(ours, DEVICE).train()
        prediction(ours, network).square().mean().backward()
        found.append([parameter.grad for parameter in trainable_parameters(network).values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("precision", "method", "remedy"),
    [
        (
            Precision(Storage.bf16, Dtype.float32),
            Lora(alpha=1.0),
            "precision=fp32, or precision.compute=bfloat16",
        ),
        (
            Precision(Storage.fp16, Dtype.float32),
            Lora(alpha=1.0),
            "precision=fp32, or precision.compute=float16",
        ),
        (Precision(Storage.fp8, Dtype.bfloat16), Full(), "freezes none; type method=lora, or precision=bf16"),
        (Precision(Storage.fp8, Dtype.float32), Full(), "precision=fp32"),
        *(
            (Precision(storage, Dtype.bfloat16), Full(), "type method=lora, or precision=bf16")
            for storage in (*QUANTISED, Storage.native)
        ),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_type(run: Run, precision: Precision, method, remedy: str):
    with pytest.raises(UsageError, match=remedy):
        rules.check(replace(run, precision=precision, method=method))


# The scale of the loss


def linear(loss_scale: LossScale | None, *, overflow_at: tuple[int, ...] = (), bearable: float = 1000.0):
    """Four SGD steps of least squares, and weights and average after each; in the steps named, gradients overflow if scaled by more than is
    bearable."""
    parameter, average = nn.Parameter(torch.zeros(3)), [torch.zeros(3)]
    x, y = normal((5, 3), "x"), normal((5,), "y")
    optimizer, done, weights = torch.optim.SGD([parameter], lr=0.1, momentum=0.9), [], []

    def losses(rows: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = (rows["x"] @ parameter - rows["y"]) ** 2
        if rows["step"] in overflow_at:
            loss.register_hook(lambda gradient: gradient * (math.inf if gradient.abs().max() > bearable / 5 else 1))
        return loss

    batches = ((step, [{"x": x, "y": y, "step": step}]) for step in range(1, 5))
    loop = TrainingLoop(
        parameters=[parameter],
        losses=losses,
        optimizer=optimizer,
        learning_rate=lambda step: 0.1,
        batch_size=5,
        max_grad_norm=1e9,
        seed=0,
        average=average,
        decay=0.9,
        loss_scale=loss_scale,
    )
    for step in loop.steps(batches):
        done.append(step)
        weights.append((parameter.detach().clone(), average[0].clone()))
    return done, weights


def test_scaling_the_loss_changes_no_digit():
    plain, scaled = linear(None), linear(LossScale())
    assert plain[0] == scaled[0]
    for (one, one_average), (other, other_average) in zip(plain[1], scaled[1], strict=True):
        assert torch.equal(one, other) and torch.equal(one_average, other_average)


def test_a_step_whose_gradients_overflow_counts_updates_nothing_and_halves_the_scale():
    scale = LossScale(value=4096.0)
    done, weights = linear(scale, overflow_at=(2, 3))
    assert [step.number for step in done] == [1, 2, 3, 4]
    assert [math.isfinite(step.grad_norm) for step in done] == [True, False, False, True]
    assert all(math.isfinite(step.loss) for step in done)
    for before, after in ((0, 1), (1, 2)):
        assert torch.equal(weights[before][0], weights[after][0]) and torch.equal(weights[before][1], weights[after][1])
    assert not torch.equal(weights[2][0], weights[3][0])
    assert (scale.value, scale.since) == (1024.0, 1)


def test_the_scale_doubles_after_two_thousand_steps_without_overflow():
    scale = LossScale(value=2.0)
    for _ in range(1999):
        scale.update(finite=True)
    assert scale.value == 2
    scale.update(finite=True)
    assert (scale.value, scale.since) == (4, 0)


def test_gradients_that_are_not_finite_without_any_scale_are_said_to_be_and_not_used():
    scale = LossScale(value=1.0)
    done, weights = linear(scale, overflow_at=(2,), bearable=0.0)
    assert [step.finite for step in done] == [True, False, True, True]
    assert torch.equal(weights[0][0], weights[1][0]) and scale.value == 1


def test_only_float16_products_need_a_scale():
    assert {p.compute for p in PRECISIONS if p.loss_scale()} == {Dtype.float16}
    precision = Precision(Storage.fp16, Dtype.float16)
    assert precision.loss_scale({"value": 8.0, "since": 3}) == LossScale(8.0, 3)


def test_a_float16_run_continues_with_its_scale_as_if_it_had_never_stopped(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A CPU is refused float16 for its slowness alone.
    able = Card(name="CPU", float16=True)
    monkeypatch.setattr(rules, "detect_card", lambda device: able)
    command = f"""model=flux_kontext model.path={run.model.path} model.text_length=8 dataset.resolution=32 dataset.pairs=4 dataset.held_out=1
        precision=fp16 hardware.device=cpu method.rank=2 batch=2 save.every=1 evaluation.images=1 evaluation.samples=1 sample.steps=1 tracking=none""".split()
    folders = []
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for stop in stops:
            parent = [f"resume={folders[-1]}"] if stop == 4 and len(stops) > 1 else []
            assert main([*command, "lr_scheduler=constant", f"out={tmp_path / name}", f"steps={stop}", *parent]) == 0
            folders.append(
                max((tmp_path / name).glob("*/checkpoints"), key=lambda path: path.stat().st_mtime_ns).parent
            )
    whole, parts = (Checkpoints(folder / "checkpoints", 9).load(4) for folder in (folders[0], folders[-1]))
    assert whole.state["loss_scale"] == parts.state["loss_scale"]
    assert all(torch.equal(whole.weights[name], parts.weights[name]) for name in whole.weights)
    values = [record.get("values", {}) for _, record in read_records(folders[0] / "journal.jsonl")]
    assert [value["train/loss_scale"] for value in values if "train/loss" in value][-1] == whole.state["loss_scale"][
        "value"
    ]


# Checkpoints that are quantised already

QUANTISERS = {
    "fp8 as a bare cast": lambda name, weight: {f"{name}.weight": weight.to(torch.float8_e4m3fn)},
    "fp8 with a scale": lambda name, weight: {
        f"{name}.weight": (weight / weight.abs().max() * 448).to(torch.float8_e4m3fn),
        f"{name}.weight_scale": weight.abs().max() / 448,
    },
    "fp8 with a scale a row": lambda name, weight: {
        f"{name}.weight": (weight / weight.abs().amax(1, keepdim=True) * 57344).to(torch.float8_e5m2),
        f"{name}.scale_weight": weight.abs().amax(1, keepdim=True) / 57344,
    },
    "int8": lambda name, weight: {
        f"{name}.weight": (weight / weight.abs().amax(1, keepdim=True) * 127).round().to(torch.int8),
        f"{name}.SCB": weight.abs().amax(1),
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    },
    "fp4": lambda name, weight: four_bit_as_bitsandbytes_saves(name, weight, "fp4", False),
    "nf4": lambda name, weight: four_bit_as_bitsandbytes_saves(name, weight, "nf4", True),
}


def four_bit_as_bitsandbytes_saves(name: str, weight: torch.Tensor, kind: str, nested: bool) -> dict[str, torch.Tensor]:
    codes, state = import_bitsandbytes().functional.quantize_4bit(
        weight.to(torch.bfloat16), compress_statistics=nested, quant_type=kind
    )
    return {f"{name}.weight": codes} | {
        f"{name}.weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()
    }


def quantised_checkpoint(run: Run, how: str, folder: Path) -> tuple[Run, dict[str, torch.Tensor]]:
    """The tiny checkpoint with its denoiser quantised by others, and what is in the file."""
    shutil.copytree(run.model.folder(), folder)
    place, network, tensors = folder / run.model.denoiser, run.model.load_network(torch.float32), {}
    small = torch.float8_e4m3fn if how == "fp8 as a bare cast" else torch.bfloat16
    for name, layer in network.named_modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            if isinstance(layer, nn.Linear) and leaf == "weight":
                tensors |= QUANTISERS[how](name, parameter.detach())
            else:
                tensors[f"{name}.{leaf}"] = parameter.detach().to(small)
    tensor_files.save_tensors(place / f"{DIFFUSERS_WEIGHTS}.safetensors", tensors)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": how.endswith("4"), "load_in_8bit": how == "int8"}
    files.write_json(place / "config.json", files.read_json(place / "config.json") | {"quantization_config": settings})
    native = Precision(Storage.native, Dtype.float32)
    return replace(run, model=replace(run.model, path=str(folder)), precision=native), tensors


@pytest.mark.parametrize("how", QUANTISERS)
def test_a_checkpoint_that_is_quantised_already_is_taken_as_it_is(run: Run, how: str, tmp_path: Path):
    ours, tensors = quantised_checkpoint(run, how, tmp_path / "checkpoint")
    network = build_network(ours, DEVICE)
    whole = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(whole) == sum(type(module) is nn.Linear for module in run.model.meta_model().modules())
    for name, layer in whole.items():
        there = tensors[f"{name.removesuffix('.base_layer')}.weight"].to(DEVICE)
        assert torch.equal(layer.codes.view(torch.uint8), there.view(torch.uint8))
    # Every layer still is about what it was made of, and the network predicts and learns as one with those weights.
    plain = build_network(run, DEVICE)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            path, _, leaf = name.rpartition(".")
            read = getattr(network.get_submodule(path), leaf)
            assert ((read - parameter).norm() <= 0.13 * parameter.norm()).item(), name
            parameter.copy_(read)
    found, expected = prediction(ours, network), prediction(run, plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for output in (found, expected):
        output.square().mean().backward()
    for name, parameter in trainable_parameters(network).items():
        torch.testing.assert_close(parameter.grad, trainable_parameters(plain)[name].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("how", ["fp8 as a bare cast", "fp4"])
def test_an_adapter_on_a_quantised_checkpoint_is_trained_by_the_program_and_merged_into_whole_weights(
    run: Run, how: str, tmp_path: Path
):
    ours, _ = quantised_checkpoint(run, how, tmp_path / "checkpoint")
    command = f"""model=flux_kontext model.path={ours.model.path} model.text_length=8 dataset.resolution=32 dataset.pairs=4 dataset.held_out=1
        hardware.device=cpu method.rank=2 batch=2 steps=2 optimizer.lr=1e-2 evaluation.images=1 sample.steps=1 tracking=none
        out={tmp_path / "runs"}""".split()
    assert main([*command, "precision=native", "precision.compute=float32"]) == 0
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/run.json"))
    assert main(["stage=export", f"run={folder}", "export.formats=[pipeline]"]) == 0
    pipeline = folder / "export" / "pipeline"
    assert "quantization_config" not in files.read_json(pipeline / "transformer" / "config.json")
    again = FluxTransformer2DModel.from_pretrained(pipeline / "transformer", torch_dtype=torch.float32)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_text_encoder_that_is_quantised_too_is_read_by_a_program_that_has_hidden_bitsandbytes(
    run: Run, tmp_path: Path
):
    ours, _ = quantised_checkpoint(run, "fp4", tmp_path / "checkpoint")
    folder = tmp_path / "checkpoint" / "text_encoder_2"
    tensors, settings = {}, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    for name, tensor in tensor_files.load_tensors(folder / "model.safetensors").items():
        is_linear = re.search(r"\.[qkvo]\.weight$|\.wi_\d\.weight$", name)
        tensors |= (
            QUANTISERS["fp4"](name.removesuffix(".weight"), tensor) if is_linear else {name: tensor.to(torch.bfloat16)}
        )
    tensor_files.save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    files.write_json(
        folder / "config.json", files.read_json(folder / "config.json") | {"quantization_config": settings}
    )
    command = f"""model=flux_kontext model.path={ours.model.path} model.text_length=8 dataset.resolution=32 dataset.pairs=4 dataset.held_out=1
        hardware.device=cpu method.rank=2 batch=2 steps=1 evaluation.images=1 sample.steps=1 tracking=none precision=native
        precision.compute=float32 out={tmp_path / "runs"}""".split()
    done = subprocess.run([sys.executable, "-m", "trainer", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_quantised_and_what_is_not_are_told_apart_before_weights_are_read(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
):
    ours, _ = quantised_checkpoint(run, "nf4", tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="are quantized already \\(4-bit\\).* type precision=native"):
        check_buildable(replace(ours, precision=Precision(Storage.nf4, Dtype.bfloat16)))
    with pytest.raises(UsageError, match="of this checkpoint are not; type precision=fp8"):
        check_buildable(replace(run, precision=Precision(Storage.native, Dtype.bfloat16)))
    check_buildable(ours)
    with pytest.raises(UsageError, match=r"quantized \(I32\) in a way that is not supported"):
        ours.precision.check_checkpoint({"a.weight": "I32", "a.bias": "BF16"})
    command = f"stage=check model=flux_kontext model.path={ours.model.path} dataset.resolution=32 hardware.device=cpu out={tmp_path}".split()
    assert main([*command, "precision=fp8"]) == 64
    assert "type precision=native" in capsys.readouterr().err


def test_where_to_begin_from_is_looked_for_before_weights_are_read(run: Run, tmp_path: Path):
    wanted = replace(run, method=replace(run.method, init_from="no-such-run"), out=str(tmp_path))
    with pytest.raises(UsageError, match="neither no-such-run nor"):
        check_buildable(wanted)
    # A run that has weights of its own needs them no more.
    check_buildable(wanted, is_new=False)
