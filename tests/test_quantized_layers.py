"""Quantized linear layers: accuracy, gradients, memory and compilation."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from synthetic import DEVICE, normal
from torch import nn

from trainer.core.dtypes import Dtype
from trainer.model.weights import load_weights, on_meta_device
from trainer.precision import Precision, Storage
from trainer.precision.eight_bit import (
    E4M3,
    dequantize_fp8,
    dequantize_int8,
    float8_values,
    quantize_fp8,
    quantize_int8,
)
from trainer.precision.quantized_linear import QuantizedLinear

QUANTIZED = [Storage.fp8, Storage.int8, Storage.nf4, Storage.fp4]
EACH_STORAGE = pytest.mark.parametrize("storage", QUANTIZED, ids=lambda storage: storage.name)
EACH_DEVIATION = pytest.mark.parametrize("deviation", [1e-3, 0.02, 1.0, 30.0])
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
BYTES_PER_WEIGHT = {Storage.fp8: 1, Storage.int8: 1, Storage.nf4: 0.516, Storage.fp4: 0.516}
"""With the scales of blocks, without the scales of rows."""


def make_weight(deviation: float) -> torch.Tensor:
    """Returns weights (64, 256) whose rows differ in size by up to a factor of 100."""
    return normal((64, 256), "weight", deviation) * deviation * torch.linspace(0.1, 10, 64, device=DEVICE)[:, None]


def quantize_layer(storage: Storage, linear: nn.Linear) -> QuantizedLinear:
    """Quantizes a layer as `load_weights` does."""
    tensors = {f"layer.{name}": tensor.detach() for name, tensor in linear.state_dict().items()}
    return Precision(storage).quantizer((), DEVICE)("layer", linear, tensors.__getitem__)


# 8-bit weights


@EACH_DEVIATION
@EACH_DTYPE
def test_fp8_scales_are_exact_in_every_dtype(deviation: float, dtype: torch.dtype):
    weight = make_weight(deviation)
    codes, scale = quantize_fp8(weight)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.uint8, weight.shape, (64,))
    dequantized = dequantize_fp8(torch.float32, codes, scale)
    # e4m3 has three mantissa bits; below 2^-14 of the largest weight of a row, its steps are even.
    bound = torch.maximum(weight.abs() / 16, weight.abs().amax(1, keepdim=True) * 2**-17)
    assert ((dequantized - weight).abs() <= bound).all()
    assert ((dequantized - weight).norm() / weight.norm()).item() == pytest.approx(0.0265, abs=1e-3)
    # float16 has steps of 2^-24 near zero, for any weights.
    atol = 2**-25 if dtype is torch.float16 else 0
    torch.testing.assert_close(dequantize_fp8(dtype, codes, scale).float(), dequantized, rtol=0, atol=atol)


@pytest.mark.parametrize(("deviation", "ratio"), [(0.02, 1.2), (0.005, 4.0)])
def test_row_scales_are_more_accurate_than_a_plain_cast(deviation: float, ratio: float):
    weight = normal((256, 256), "weight") * deviation
    cast, scaled = weight.to(E4M3).float(), dequantize_fp8(torch.float32, *quantize_fp8(weight))
    assert (cast - weight).norm() > ratio * (scaled - weight).norm()


def test_fp8_handles_rows_of_zeros_and_extreme_numbers():
    weight = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [1e-4, 0.0], [448.0, -1.0], [57344.0, 1e-3]], device=DEVICE)
    dequantized = dequantize_fp8(torch.float16, *quantize_fp8(weight))
    torch.testing.assert_close(dequantized.float(), weight, rtol=1 / 16, atol=0.25)
    assert dequantized[:3].abs().max() == pytest.approx(1e-4, rel=1 / 16)


def test_float8_table_equals_the_cast():
    """Devices without float8 use the table."""
    codes, scale = quantize_fp8(normal((32, 48), "weight"))
    table = float8_values(E4M3).to(DEVICE)
    assert table.shape == (256,) and table[0x7E] == 448 and table[0x7F].isnan()
    assert torch.equal(table[codes.int()].mul(scale[:, None]), dequantize_fp8(torch.float32, codes, scale))


@EACH_DEVIATION
@EACH_DTYPE
def test_int8_is_accurate_to_half_a_step_in_every_dtype(deviation: float, dtype: torch.dtype):
    weight = make_weight(deviation)
    codes, scale = quantize_int8(weight)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.int8, weight.shape, (64,))
    assert codes.abs().amax(1).min() >= 126
    dequantized = dequantize_int8(torch.float32, codes, scale)
    assert ((dequantized - weight).abs() <= 0.501 * scale[:, None]).all()
    # If 16-bit products rounded the scales, whole rows would be off.
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 127 * 2**-25}
    torch.testing.assert_close(dequantize_int8(dtype, codes, scale).float(), dequantized, **tolerance)


# Layers


@EACH_STORAGE
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_equal_those_of_dequantized_weights(storage: Storage, bias: bool):
    torch.manual_seed(0)
    quantized, plain = quantize_layer(storage, nn.Linear(48, 32, bias=bias)), nn.Linear(48, 32, bias, device=DEVICE)
    plain.load_state_dict({"weight": quantized.weight} | ({"bias": quantized.bias} if bias else {}))
    x, gradient = normal((2, 5, 48), "x"), normal((2, 5, 32), "gradient")
    x_quantized, x_plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = quantized(x_quantized), plain(x_plain)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    output.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x_quantized.grad, x_plain.grad)
    assert all(parameter.grad is None for parameter in quantized.parameters())


@EACH_STORAGE
def test_layer_computes_in_the_autocast_dtype_and_returns_gradients_in_that_of_its_input(storage: Storage):
    layer, x = quantize_layer(storage, nn.Linear(16, 8)), normal((4, 16), "x").requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)
    assert layer(x).dtype == torch.float32


@EACH_STORAGE
def test_only_quantized_tensors_are_saved_for_the_backward_pass(storage: Storage):
    layer, saved = quantize_layer(storage, nn.Linear(256, 256)), []
    x = normal((4, 256), "x").to(torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in layer.quantized_tensors()}
    # The scales of rows take 1 KiB, the value tables of bitsandbytes 1.1 KiB.
    assert sum(tensor.nbytes for tensor in saved) <= BYTES_PER_WEIGHT[storage] * 256**2 + 1200


@pytest.mark.parametrize("storage", [Storage.fp8, Storage.nf4], ids=lambda storage: storage.name)
def test_equal_layers_are_compiled_once_without_graph_breaks(storage: Storage):
    layers = [quantize_layer(storage, nn.Linear(32, 32)) for _ in range(12)]
    forward = torch.compile(lambda layer, x: layer(x), backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for requires_grad in (True, False):
        for layer in layers:
            x = normal((4, 32), "x").requires_grad_(requires_grad)
            torch.testing.assert_close(forward(layer, x), layer(x), rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


class RecordingWeights:
    """Weights of a network; records how many bytes of them are in memory at a time."""

    def __init__(self, network: nn.Module):
        self.network, self.alive, self.peak_bytes = network, weakref.WeakSet(), 0

    def read(self, name: str) -> torch.Tensor:
        gc.collect()
        tensor = normal(tuple(self.network.get_parameter(name).shape), name)
        self.alive.add(tensor)
        self.peak_bytes = max(self.peak_bytes, sum(each.nbytes for each in self.alive))
        return tensor


def test_layers_are_read_and_quantized_one_at_a_time():
    with on_meta_device():
        network = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)), nn.Linear(32, 4))
    weights, precision = RecordingWeights(network), Precision(Storage.fp8, Dtype.bfloat16)
    load_weights(network, weights.read, precision.dtype(), DEVICE, precision.quantizer(("2",), DEVICE))
    # At most one of the three layers and a bias are in float32.
    assert weights.peak_bytes <= 32 * 32 * 4 + 32 * 4
    assert [type(network[0]), type(network[1][0]), type(network[2])] == [QuantizedLinear, QuantizedLinear, nn.Linear]
    assert {parameter.dtype for parameter in network.parameters()} == {torch.uint8, torch.bfloat16}
