"""Forecasts a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil

from trainer.cache.store import Entry
from trainer.config.schema import Run
from trainer.config.sections import Format
from trainer.core.errors import TrainerError, UsageError
from trainer.evaluation.held_out_loss import QUANTILES
from trainer.forecast import GIB, Disk, Forecast, Memory, Time
from trainer.forecast.phases import Phases, Trace, autoencoder, optimizer_bytes, parameter_bytes
from trainer.forecast.rates import seconds
from trainer.hardware import Card, Device
from trainer.hardware.devices import detect_card
from trainer.model.encoder_networks import meta_encoder
from trainer.training.average import keeps_average
from trainer.training.batches import Batches
from trainer.training.data import (
    TrainingData,
    held_out_samples,
    required_samples,
    samples_to_generate,
    unconditional_samples,
)
from trainer.training.evaluator import MAX_BATCH_SIZE, evaluation_interval

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample

CUDA_CONTEXT = GIB // 2
"""Memory that CUDA and its libraries take in a process, about 0.5 GiB."""
WHOLE_CHECKPOINTS = (Format.pipeline, Format.single_file)


def try_forecast(run: Run, data: TrainingData, warn: Callable[[str], None]) -> Forecast | None:
    """Returns the forecast of a run; None, after a warning, if its code does not run on tensors without values."""
    try:
        return forecast(run, data)
    except TrainerError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        warn(f"The memory of this run cannot be forecast: {type(error).__name__}: {reason}")
        return None


def forecast(run: Run, data: TrainingData) -> Forecast:
    """Returns the forecast of a run, for its largest images.

    `run.model` may have configs only (`with_published_configs`). Raises errors.UsageError if the device is absent.
    """
    assert run.batch is not None
    card, is_cpu = known_card(run)
    sample = largest_sample(run, data)
    shapes = sample_shapes(run, sample)
    phases = Phases(run)
    trained = sum(parameter.nbytes for parameter in phases.parameters.values())
    trained_count = sum(parameter.numel() for parameter in phases.parameters.values())
    micro_batch = run.hardware.micro_batch_for(run.batch, phases.network_count)
    micro_batches = -(-run.batch // micro_batch)
    kept, temporary = optimizer_bytes(run, next(iter(phases.parameters.values())).dtype)
    images = len(samples_to_generate(run, data))
    largest = run.hardware.micro_batch_for(MAX_BATCH_SIZE, phases.network_count)
    held_out = len(held_out_samples(data, run.evaluation.samples)) * len(QUANTILES)
    evaluated = min(largest, max(held_out, images, 1))

    batches = Batches(data.visits, data.cache, run.model, micro_batch)
    training = phases.train(shapes, micro_batch, micro_batches > 1, batches.has_loss_weights)
    evaluation = phases.predict(shapes, evaluated)
    vae = autoencoder(run, (sample.height, sample.width), min(largest, max(images, 1)))
    static = Memory(
        weights=parameter_bytes(phases.network) - trained,
        trained=trained,
        optimizer=int(trained_count * (kept + 4 * keeps_average(run))),
        # The VAE stays where it is after the first images.
        encoders=vae.weights if images else 0,
        context=psutil.Process().memory_info().rss if is_cpu else CUDA_CONTEXT if is_cuda(run) else 0,
    )
    missing = data.cache.missing(required_samples(run, data))
    caching = Memory(encoders=encoder_bytes(run), work_space=vae.encode, context=static.context)
    return Forecast(
        parameters=phases.network_count,
        trained_parameters=trained_count,
        memory={
            **({"caching": caching} if missing else {}),
            "training": training_peak(static, training, int(trained_count * temporary)),
            "evaluation": replace(static, gradients=trained, work_space=evaluation.work_space),
            "drawing": replace(static, gradients=trained, work_space=max(evaluation.work_space, vae.decode)),
        },
        time=run_time(run, data, card, training, micro_batches, evaluation, evaluated),
        disk=disk_space(run, missing, phases, static.optimizer),
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        card=card.name or "this device",
        available=None if card.memory_gib is None else int(card.memory_gib * GIB),
    )


def known_card(run: Run) -> tuple[Card, bool]:
    """Returns the facts of the hardware profile, or of this machine's device if the profile has none; and whether it is
    a CPU. The memory of a CPU is that of this machine."""
    card = run.hardware.card
    if card.memory_gib is not None:
        return card, False
    try:
        device = run.hardware.open()
    except UsageError:
        return card, run.hardware.device is Device.cpu
    detected = detect_card(device)
    return replace(card, name=card.name or detected.name, memory_gib=detected.memory_gib), device.type == "cpu"


def is_cuda(run: Run) -> bool:
    """Returns whether the device of a run is CUDA, as far as the settings say."""
    return run.hardware.device in (Device.cuda, Device.auto)


def training_peak(static: Memory, trace: Trace, temporary: int) -> Memory:
    """Returns the peak of training: in the backward pass, or in the optimizer's step with all gradients."""
    backward = replace(static, gradients=trace.gradients, activations=trace.activations, work_space=trace.work_space)
    update = replace(static, gradients=static.trained, work_space=temporary)
    return max(backward, update, key=lambda memory: memory.total)


def encoder_bytes(run: Run) -> int:
    """Returns the size of the encoders that fill the cache, which are on the device together."""
    model = run.model
    return sum(
        sum(parameter.numel() for parameter in meta_encoder(model, name).parameters())
        * model.encoder_dtype_of(name).torch.itemsize
        for name in model.encoders
    )


def sample_shapes(run: Run, sample: TransformedSample) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the cached tensors of a sample."""
    sizes = [sample.size(name) for name in sample.control_names]
    return run.model.shapes(sample.height, sample.width, [(height, width) for width, height in sizes])


def largest_sample(run: Run, data: TrainingData) -> TransformedSample:
    """Returns a training sample with the largest cached tensors, at the largest of its resolutions."""
    transformed = [data.transform.apply(sample) for sample in data.split.trained]
    return max(transformed, key=lambda sample: sum(map(math.prod, sample_shapes(run, sample).values())))


def run_time(
    run: Run, data: TrainingData, card: Card, training: Trace, micro_batches: int, evaluation: Trace, evaluated: int
) -> Time:
    """Returns the time of a run without encoding. `evaluated` is the batch size of `evaluation`."""
    flops, step_seconds = training.flops * micro_batches, seconds(training.work, card)
    pass_seconds = seconds(evaluation.work, card)
    if step_seconds is None or pass_seconds is None:
        return Time(flops, None, None, None)
    assert run.sample.steps is not None
    steps = data.total_steps(run)
    images = samples_to_generate(run, data)
    guided = 2 if unconditional_samples(run, [sample for sample, _ in images]) else 1
    held_out = len(held_out_samples(data, run.evaluation.samples)) * len(QUANTILES)
    passes = held_out + len(images) * run.sample.steps * guided
    # Step 0 is evaluated, too.
    evaluations = 1 - (-steps // evaluation_interval(run, steps))
    evaluation_seconds = passes / evaluated * pass_seconds * evaluations
    step_seconds *= micro_batches
    return Time(flops, step_seconds, evaluation_seconds, steps * step_seconds + evaluation_seconds)


def disk_space(run: Run, missing: list[Entry], phases: Phases, optimizer: int) -> Disk:
    """Returns the size of the files that a run writes. `missing` are entries of the cache."""
    # Cached tensors are float32 or smaller.
    cache = sum(4 * math.prod(sample_shapes(run, sample).get(name, ())) for name, sample in missing)
    trained = sum(parameter.nbytes for parameter in phases.parameters.values())
    trained_count = sum(parameter.numel() for parameter in phases.parameters.values())
    exports = 0
    for name in run.export.select(run.method.formats, run.model.unsupported_formats):
        if name in WHOLE_CHECKPOINTS:
            dtype = run.export.dtype.torch if run.export.dtype else run.method.dtype(run.precision.dtype())
            exports += phases.network_count * dtype.itemsize + encoder_bytes(run)
        else:
            exports += trained_count * (run.export.dtype.torch.itemsize if run.export.dtype else 4)
    return Disk(cache, (run.save.keep + 1) * (trained + optimizer), exports)
