"""The network of a run without values: everything but its numbers is as in training."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from trainer.config.schema import Run
from trainer.model.weights import load_weights
from trainer.precision import Storage
from trainer.training.build import apply_hardware

DEVICE = torch.device("cpu")
"""Where tensors without values pretend to be. Autograd of a torch without CUDA accepts no other device."""


def fake_network(run: Run, mode: FakeTensorMode) -> torch.nn.Module:
    """Returns the network that `training.build.build_network` would return, with fake tensors.

    Weights are read only if they are quantized already, as their types are not known without them.
    """
    meta = torch.device("meta")
    network = run.model.meta_model()
    read, dtypes = network.state_dict().__getitem__, None
    if run.precision.storage is Storage.native:
        weights = run.model.weights()
        read, dtypes = weights.read, weights.dtypes()
    quantize = run.precision.quantizer(run.model.unquantized_modules, meta, dtypes)
    network = load_weights(network, read, run.method.dtype(run.precision.dtype()), meta, quantize)
    with meta:
        run.method.attach(network, run.model.target_modules, run.seed)
    apply_hardware(run, network)
    return make_fake(network, mode)


def make_fake(network: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """Replaces the parameters and buffers of a network by fake tensors that pretend to be on `DEVICE`."""
    made: dict[int, FakeTensor] = {}

    def fake(tensor: torch.Tensor) -> FakeTensor:
        if id(tensor) not in made:
            made[id(tensor)] = FakeTensor(mode, tensor.detach().to("meta"), DEVICE)
        return made[id(tensor)]

    originals = [*network.parameters(), *network.buffers()]  # alive, so that no id is used twice
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, torch.nn.Parameter(fake(parameter), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = fake(buffer)
    originals.clear()
    return network
