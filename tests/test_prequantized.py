"""Checkpoints that are quantized already: loading, training on them, exporting, and telling them apart from others."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from quantized_networks import (
    assert_equal_predictions_and_gradients,
    copy_dequantized_weights,
    dequantized_weight,
    predict,
)
from synthetic import DEVICE
from torch import nn

from trainer.__main__ import main
from trainer.config.compose import compose_config, to_run
from trainer.config.schema import Run
from trainer.core import documents, files, tensor_files
from trainer.core.dtypes import Dtype
from trainer.core.errors import UsageError
from trainer.core.libraries import import_bitsandbytes
from trainer.model.flux_kontext import FluxKontext
from trainer.model.weights import DIFFUSERS_WEIGHTS
from trainer.precision import Precision, Storage
from trainer.precision.quantized_linear import QuantizedLinear
from trainer.training.build import build_network, check_buildable

Tensors = dict[str, torch.Tensor]


def cast_fp8(name: str, weight: torch.Tensor) -> Tensors:
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn)}


def scale_layer_fp8(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    return {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}


def scale_rows_fp8(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 57344
    return {f"{name}.weight": (weight / scale).to(torch.float8_e5m2), f"{name}.scale_weight": scale}


def quantize_int8(name: str, weight: torch.Tensor) -> Tensors:
    largest = weight.abs().amax(1)
    return {
        f"{name}.weight": (weight / largest[:, None] * 127).round().to(torch.int8),
        f"{name}.SCB": largest,
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def quantize_4bit(name: str, weight: torch.Tensor, kind: str, double_quantization: bool) -> Tensors:
    codes, state = import_bitsandbytes().functional.quantize_4bit(
        weight.to(torch.bfloat16), compress_statistics=double_quantization, quant_type=kind
    )
    state_tensors = {f"{name}.weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {f"{name}.weight": codes} | state_tensors


QUANTIZERS: dict[str, Callable[[str, torch.Tensor], Tensors]] = {
    "fp8 cast": cast_fp8,
    "fp8 with a scale for each layer": scale_layer_fp8,
    "fp8 with a scale for each row": scale_rows_fp8,
    "int8": quantize_int8,
    "fp4": partial(quantize_4bit, kind="fp4", double_quantization=False),
    "nf4": partial(quantize_4bit, kind="nf4", double_quantization=True),
}
"""Other programs' quantizations -> the tensors that they store for a layer."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A LoRA run on a tiny checkpoint that is not quantized."""
    torch.set_num_threads(1)
    settings = FluxKontext.save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return to_run(compose_config(["model=flux_kontext", "method.rank=2", *settings]))


def quantize_checkpoint(run: Run, quantization: str, folder: Path) -> tuple[Run, Tensors]:
    """Copies the checkpoint of `run` with a quantized denoiser; returns a run on the copy, and the stored tensors."""
    shutil.copytree(run.model.folder(), folder)
    component, tensors = folder / run.model.denoiser, {}
    other_dtype = torch.float8_e4m3fn if quantization == "fp8 cast" else torch.bfloat16
    for name, layer in run.model.load_network(torch.float32).named_modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            if isinstance(layer, nn.Linear) and leaf == "weight":
                tensors |= QUANTIZERS[quantization](name, parameter.detach())
            else:
                tensors[f"{name}.{leaf}"] = parameter.detach().to(other_dtype)
    tensor_files.save_tensors(component / f"{DIFFUSERS_WEIGHTS}.safetensors", tensors)
    set_quantization_config(component, quantization)
    precision = Precision(Storage.native, Dtype.float32)
    return replace(run, model=replace(run.model, path=str(folder)), precision=precision), tensors


def set_quantization_config(component: Path, quantization: str) -> None:
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": quantization in ("fp4", "nf4"),
        "load_in_8bit": quantization == "int8",
        "bnb_4bit_quant_type": quantization,
    }
    path = component / "config.json"
    files.write_json(path, documents.read_json(path) | {"quantization_config": config})


def command_line(run: Run, *settings: str) -> list[str]:
    return [
        *("model=flux_kontext", f"model.path={run.model.path}", "model.text_length=8", "method.rank=2", "batch=2"),
        *("dataset.resolution=32", "dataset.pairs=4", "dataset.held_out=1", "hardware.device=cpu", "tracking=none"),
        *("evaluation.images=1", "sample.steps=1", "precision=native", "precision.compute=float32", *settings),
    ]


@pytest.mark.parametrize("quantization", QUANTIZERS)
def test_quantized_checkpoint_is_not_quantized_again(run: Run, quantization: str, tmp_path: Path):
    native_run, tensors = quantize_checkpoint(run, quantization, tmp_path / "checkpoint")
    network = build_network(native_run, DEVICE)
    quantized = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(quantized) == sum(type(module) is nn.Linear for module in run.model.meta_model().modules())
    for name, layer in quantized.items():
        stored = tensors[f"{name.removesuffix('.base_layer')}.weight"].to(DEVICE)
        assert torch.equal(layer.codes.view(torch.uint8), stored.view(torch.uint8))
    # The weights are near the original ones, and the network trains like one with the dequantized weights.
    plain = build_network(run, DEVICE)
    for name, parameter in plain.named_parameters():
        error = (dequantized_weight(network, name) - parameter).norm()
        assert (error <= 0.13 * parameter.norm()).item(), name
    copy_dequantized_weights(network, plain)
    assert_equal_predictions_and_gradients(partial(predict, run), network, plain)


@pytest.mark.parametrize("quantization", ["fp8 cast", "fp4"])
def test_adapter_on_a_quantized_checkpoint_is_merged_into_full_weights(run: Run, quantization: str, tmp_path: Path):
    native_run, _ = quantize_checkpoint(run, quantization, tmp_path / "checkpoint")
    assert main(command_line(native_run, "steps=2", "optimizer.lr=1e-2", f"out={tmp_path / 'runs'}")) == 0
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/run.json"))
    assert main(["stage=export", f"run={folder}", "export.formats=[pipeline]"]) == 0
    transformer = folder / "export" / "pipeline" / "transformer"
    assert "quantization_config" not in documents.read_json(transformer / "config.json")
    exported = FluxTransformer2DModel.from_pretrained(transformer, torch_dtype=torch.float32)
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.float32}


@pytest.mark.slow
def test_quantized_text_encoder_is_read_although_bitsandbytes_is_hidden(run: Run, tmp_path: Path):
    native_run, _ = quantize_checkpoint(run, "fp4", tmp_path / "checkpoint")
    component, tensors = tmp_path / "checkpoint" / "text_encoder_2", {}
    for name, tensor in tensor_files.load_tensors(component / "model.safetensors").items():
        if re.search(r"\.[qkvo]\.weight$|\.wi_\d\.weight$", name):
            tensors |= QUANTIZERS["fp4"](name.removesuffix(".weight"), tensor)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    tensor_files.save_tensors(component / "model.safetensors", tensors, {"format": "pt"})
    set_quantization_config(component, "fp4")
    command = command_line(native_run, "steps=1", f"out={tmp_path / 'runs'}")
    done = subprocess.run([sys.executable, "-m", "trainer", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_precision_for_a_checkpoint_is_refused_before_weights_are_read(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
):
    native_run, _ = quantize_checkpoint(run, "nf4", tmp_path / "checkpoint")
    check_buildable(native_run)
    with pytest.raises(UsageError, match=r"are quantized already \(4-bit\).* type precision=native"):
        check_buildable(replace(native_run, precision=Precision(Storage.nf4, Dtype.bfloat16)))
    with pytest.raises(UsageError, match="of this checkpoint are not; type precision=fp8"):
        check_buildable(replace(run, precision=Precision(Storage.native, Dtype.bfloat16)))
    with pytest.raises(UsageError, match=r"quantized \(I32\) in a way that is not supported"):
        native_run.precision.check_checkpoint({"a.weight": "I32", "a.bias": "BF16"})
    assert main(command_line(native_run, "stage=check", "precision=fp8", f"out={tmp_path}")) == 64
    assert "type precision=native" in capsys.readouterr().err
