"""`stage=check`: prints what would be trained, and a report about the data. Loads no weights."""

from __future__ import annotations

import math
from pathlib import Path

from trainer.config.groups import option_name
from trainer.config.identity import run_id
from trainer.config.schema import Run
from trainer.core.console import format_bytes, print_line
from trainer.dataset.transform import TransformedSample
from trainer.method.trainable import trainable_parameters
from trainer.stages.data_report import describe_many_visits, report_data
from trainer.training.average import keeps_average
from trainer.training.build import check_buildable, describe_precision
from trainer.training.data import TrainingData, prepare, required_samples


def execute(run: Run) -> None:
    """Prints what would be trained, and the data report. Raises errors.DataError if the data has faults."""
    data = prepare(run)
    run.lr_scheduler.check(data.total_steps(run))
    check_buildable(run)
    network = run.model.meta_model()
    run.model.check_tensors(network)
    run.method.attach(network, run.model.target_modules, run.seed)
    total = sum(parameter.numel() for parameter in network.parameters())
    trainable = sum(parameter.numel() for parameter in trainable_parameters(network).values())
    method = option_name(run.method)
    print_line(f"identity    {run_id(run)}  (folder {Path(run.out) / run_id(run)})")
    print_line(f"model       {run.model.path}: {total:,} parameters with {method}, {trainable:,} of them trainable")
    _print_length(run, data, total)
    print_line(
        f"optimizer   {option_name(run.optimizer)}, learning rate {run.optimizer.lr:g}, "
        f"{option_name(run.lr_scheduler)} with {run.lr_scheduler.warmup} steps of warm-up"
    )
    print_line(f"precision   {describe_precision(run)}")
    _print_disk_space(run, data, trainable)
    for warning in run.model.warnings():
        print_line(f"warning     {warning}")
    report_data(run, data)


def _print_length(run: Run, data: TrainingData, parameter_count: int) -> None:
    assert run.batch is not None
    steps = data.total_steps(run)
    epochs = data.visits.training_count(steps) / len(data.visits.training)
    micro_batch_size = run.hardware.micro_batch_for(run.batch, parameter_count)
    micro_batches = -(-run.batch // micro_batch_size)
    print_line(
        f"training    {steps} steps of {run.batch}: {epochs:.1f} epochs; "
        f"{micro_batches} micro-batch(es) of up to {micro_batch_size}"
    )
    for line in describe_many_visits(run, data):
        print_line(f"            {line}")


def _print_disk_space(run: Run, data: TrainingData, trainable: int) -> None:
    missing = data.cache.missing(required_samples(run, data))
    # Cached tensors are float32 or smaller.
    cache_bytes = sum(4 * math.prod(_cached_shapes(run, sample).get(name, ())) for name, sample in missing)
    print_line(f"cache       {data.cache.root}: {len(missing)} entries to make, up to {format_bytes(cache_bytes)}")
    # A checkpoint has float32 weights, two moments of each, and possibly their average.
    checkpoint_bytes = trainable * 4 * (3 + keeps_average(run))
    total_bytes = (run.save.keep + 1) * checkpoint_bytes
    print_line(f"checkpoints up to {format_bytes(total_bytes)} for the last {run.save.keep} and the best")


def _cached_shapes(run: Run, sample: TransformedSample) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the cached tensors of a sample."""
    control_sizes = []
    for name in sample.control_names:
        width, height = sample.size(name)
        control_sizes.append((height, width))
    return run.model.shapes(sample.height, sample.width, control_sizes)
