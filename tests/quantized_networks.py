"""Comparisons of networks that have quantized layers with networks that have the dequantized weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from synthetic import DEVICE, normal

from trainer.config.schema import Run
from trainer.method.trainable import trainable_parameters


def dequantized_weight(quantized: torch.nn.Module, name: str) -> torch.Tensor:
    """Returns a weight of `quantized` by its name in the network without quantized layers.

    The weight of a quantized layer is a property, not a parameter.
    """
    path, _, leaf = name.rpartition(".")
    return getattr(quantized.get_submodule(path), leaf)


def copy_dequantized_weights(quantized: torch.nn.Module, plain: torch.nn.Module) -> None:
    """Copies the dequantized weights, and the trainable parameters, to a network without quantized layers."""
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(dequantized_weight(quantized, name))


def assert_equal_predictions_and_gradients(
    predict: Callable[[torch.nn.Module], torch.Tensor],
    network: torch.nn.Module,
    expected: torch.nn.Module,
    rtol: float = 1e-4,
) -> None:
    """Asserts that both networks predict the same, and that their trainable parameters get the same gradients."""
    output, expected_output = predict(network), predict(expected)
    torch.testing.assert_close(output, expected_output, rtol=0, atol=1e-6)
    output.square().mean().backward()
    expected_output.square().mean().backward()
    expected_parameters = trainable_parameters(expected)
    for name, parameter in trainable_parameters(network).items():
        torch.testing.assert_close(parameter.grad, expected_parameters[name].grad, rtol=rtol, atol=1e-7)


def predict(run: Run, network: torch.nn.Module) -> torch.Tensor:
    """Returns the prediction of a tiny FLUX Kontext network for a fixed input, (2, 4, 8, 6)."""
    latents, control = normal((2, 4, 8, 6), "latents"), normal((2, 4, 8, 6), "control")
    conditions = {"control": control, "prompt": normal((2, 8, 16), "prompt"), "pooled": normal((2, 16), "pooled")}
    with run.precision.autocast(DEVICE):
        return run.model.predict(network, latents, torch.tensor([0.3, 0.7], device=DEVICE), conditions).float()
