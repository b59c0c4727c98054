"""`stage=check`: prints what would be trained, and a report about the data. Loads no weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer.config.groups import option_name
from trainer.config.identity import run_id
from trainer.config.schema import Run
from trainer.core.console import print_line
from trainer.forecast import Forecast
from trainer.stages.data_report import describe_many_visits, report_data
from trainer.training.build import check_buildable, describe_precision
from trainer.training.data import TrainingData, prepare


def execute(run: Run) -> None:
    """Prints what would be trained, the forecast, and the data report.

    If the model must be downloaded, and its configs come with the program, these are enough. Raises errors.DataError if
    the data has faults, errors.UsageError if the run does not fit into the memory of its card.
    """
    from trainer.forecast.advice import check_fits
    from trainer.forecast.predict import try_forecast
    from trainer.forecast.table import table

    identity, path, absent = run_id(run), run.model.path, run.model.is_absent()
    if absent:
        run = replace(run, model=run.model.with_published_configs())
    data = prepare(run, has_weights=not absent)
    run.lr_scheduler.check(data.total_steps(run))
    if not absent:
        check_buildable(run)
        run.model.check_tensors(run.model.meta_model())
    found = try_forecast(run, data, lambda text: print_line(f"warning     {text}"))
    print_line(f"identity    {identity}  (folder {Path(run.out) / identity})")
    if found:
        print_line(
            f"model       {path}: {found.parameters:,} parameters with {option_name(run.method)}, "
            f"{found.trained_parameters:,} of them trainable"
        )
    _print_length(run, data, found)
    print_line(
        f"optimizer   {option_name(run.optimizer)}, learning rate {run.optimizer.lr:g}, "
        f"{option_name(run.lr_scheduler)} with {run.lr_scheduler.warmup} steps of warm-up"
    )
    print_line(f"precision   {describe_precision(run)}")
    for line in table(found) if found else ():
        print_line(line)
    if absent:
        print_line(f"note        {path} is not on this machine: training downloads it, and then checks its files")
    for warning in run.model.warnings():
        print_line(f"warning     {warning}")
    report_data(run, data, Path(run.out) / "check" / identity)
    if found:
        check_fits(run, data, found)


def _print_length(run: Run, data: TrainingData, found: Forecast | None) -> None:
    assert run.batch is not None
    steps = data.total_steps(run)
    epochs = data.visits.training_count(steps) / len(data.visits.training)
    # Images of different sizes are in different micro-batches.
    least = "at least " if len(data.transform.sizes) > 1 else ""
    text = f"training    {steps} steps of {run.batch}: {epochs:.1f} epochs"
    if found:
        text += f"; {least}{found.micro_batches} micro-batch(es) of up to {found.micro_batch}"
    print_line(text)
    for line in describe_many_visits(run, data):
        print_line(f"            {line}")
