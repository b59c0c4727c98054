"""The phases of a run, each run once on tensors without values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from trainer.config.schema import Run
from trainer.core.batch import get_conditions
from trainer.forecast.fake_network import DEVICE, fake_network, make_fake
from trainer.forecast.live_memory import LiveMemory
from trainer.method.trainable import set_train_mode, trainable_parameters
from trainer.model.encoder_networks import meta_encoder
from trainer.training.predictor import Predictor

if TYPE_CHECKING:
    from trainer.core.batch import Batch

MAX_KNOWN_VALUES = 64
"""Largest number of entries of a tensor whose values are followed: one for each sample of a micro-batch."""
Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of the cached tensors of a sample, by name."""
Work = dict[tuple[str, int, int], int]
"""See `LiveMemory.work`."""


@dataclass(slots=True, frozen=True)
class Trace:
    """What one phase needs, besides the weights, in bytes, and what it computes."""

    gradients: int
    activations: int
    """What the forward pass leaves for the backward pass."""
    work_space: int
    """The rest of the peak."""
    flops: int
    work: Work


class Phases:
    """The network of a run, and what the phases of the run need."""

    def __init__(self, run: Run) -> None:
        self.run, self.mode = run, FakeTensorMode(allow_non_fake_inputs=True)
        self.network = fake_network(run, self.mode)
        self.parameters = trainable_parameters(self.network)
        self.network_count = sum(parameter.numel() for parameter in self.network.parameters())
        self.predictor = Predictor(run, self.network, DEVICE)

    def train(self, shapes: Shapes, samples: int, accumulates: bool, weighted: bool) -> Trace:
        """Returns what the forward and backward pass of a micro-batch needs.

        `accumulates`: whether gradients of an earlier micro-batch exist. `weighted`: see `Batches.has_loss_weights`.
        """
        set_train_mode(self.network)
        live = LiveMemory(DEVICE)
        with self.mode:
            batch = self._batch(shapes, samples, weighted)
            for parameter in self.parameters.values():
                parameter.grad = torch.empty_like(parameter) if accumulates else None
        live.count_gradients(iter(self.parameters.values()))
        for tensor in batch.values():
            live.add(tensor)
        before = live.gradient_bytes
        with self.mode, live, _known_values():
            loss = self.predictor.losses(batch).sum()
            saved = live.bytes - before
            loss.backward()
        for parameter in self.parameters.values():
            parameter.grad = None
        gradients = live.gradient_bytes_at_peak
        activations = min(saved, live.peak - gradients)
        return Trace(gradients, activations, live.peak - gradients - activations, live.flops, live.work)

    def predict(self, shapes: Shapes, samples: int) -> Trace:
        """Returns what a forward pass without gradients needs."""
        self.network.eval()
        live = LiveMemory(DEVICE)
        with self.mode:
            batch = self._batch(shapes, samples, weighted=False)
        for tensor in batch.values():
            live.add(tensor)
        with self.mode, live, torch.no_grad(), _known_values():
            self.predictor.predict(batch["latents"], batch["t"], get_conditions(batch))
        return Trace(0, 0, live.peak, live.flops, live.work)

    def _batch(self, shapes: Shapes, samples: int, weighted: bool) -> Batch:
        """Returns a micro-batch as `Batches` makes it. Cached tensors have the dtype of the encoders."""
        dtype = self.run.model.encoder_dtype.torch
        batch = {
            # Families may read the lengths of texts from masks.
            name: self._mask(samples, *shape) if name.endswith("mask") else torch.empty(samples, *shape, dtype=dtype)
            for name, shape in shapes.items()
            if name != "latents_std"
        }
        size = (samples, *shapes["latents"])
        batch["latents"], batch["noise"] = torch.empty(size, device=DEVICE), torch.empty(size, device=DEVICE)
        batch["t"] = torch.empty(samples, device=DEVICE)
        if weighted:
            batch["weight"] = torch.empty(samples, 1, *shapes["latents"][1:], device=DEVICE)
        return batch

    def _mask(self, *shape: int) -> torch.Tensor:
        """Returns a fake tensor of True, whose values are known."""
        with unset_fake_temporarily():
            ones = torch.ones(shape, dtype=torch.bool)
        return self.mode.fake_tensor_converter.from_real_tensor(self.mode, ones, make_constant=True)


@contextmanager
def _known_values() -> Iterator[None]:
    """Inside the block, torch follows the values of small fake tensors, not only of single numbers."""
    before, fake_tensor.CONSTANT_NUMEL_LIMIT = fake_tensor.CONSTANT_NUMEL_LIMIT, MAX_KNOWN_VALUES
    try:
        yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = before


@dataclass(slots=True, frozen=True)
class Autoencoder:
    """What the VAE of a run needs, in bytes."""

    weights: int
    encode: int
    decode: int


def autoencoder(run: Run, size: tuple[int, int], samples: int) -> Autoencoder:
    """Returns what encoding an image of `size` (height, width) needs, and decoding `samples` images."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = run.model.encoder_dtype_of("vae").torch
    vae: Any = make_fake(meta_encoder(run.model, "vae").to(dtype), mode)
    # The convolutions of a VAE of videos have one more dimension.
    frames = (1,) * (next(parameter.ndim for parameter in vae.parameters() if parameter.ndim > 1) - 4)

    def run_with_peak(call: Any, shape: Sequence[int]) -> tuple[Any, int]:
        live = LiveMemory(DEVICE)
        with mode, torch.no_grad():
            tensor = torch.empty(*shape, dtype=dtype, device=DEVICE)
            live.add(tensor)
            with live:
                output = call(tensor)
        return output, live.peak

    encoded, encode = run_with_peak(vae.encode, (1, 3, *frames, *size))
    # Not from the cached latents: a family may have put these into patches.
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
    _, decode = run_with_peak(vae.decode, (samples, *latents.shape[1:]))
    return Autoencoder(weights=parameter_bytes(vae), encode=encode, decode=decode)


def parameter_bytes(module: torch.nn.Module) -> int:
    """Returns the size of the parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def optimizer_bytes(run: Run, dtype: torch.dtype) -> tuple[float, float]:
    """Returns the bytes per trained number that the optimizer keeps, and that a step takes while it runs.

    Measured with a step of the real optimizer on a small matrix.
    """
    parameter = torch.nn.Parameter(torch.zeros(128, 128, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    with LiveMemory(DEVICE) as live:
        optimizer = run.optimizer.build([parameter], run.seed)
        optimizer.step()
        kept = live.bytes
    return kept / parameter.numel(), (live.peak - kept) / parameter.numel()
