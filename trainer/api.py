"""The Python API, for notebooks and scripts: `trainer.train`, `trainer.sample` and `trainer.evaluate`.

The functions take the overrides of the command line, check them in the same way, and raise the exceptions of
trainer.core.errors (`trainer.errors`) where the command line prints a message and exits. They can be called several
times in one process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from trainer.core import redaction
from trainer.core.errors import Interrupted, TrainerError, UsageError
from trainer.core.files import full_disk_errors
from trainer.core.installation import missing_package
from trainer.core.signals import Signals
from trainer.stages.results import EvaluationResult, SamplingResult, StageResult, TrainingResult

RunName = TrainingResult | str | Path
"""A run: its result, or the id or folder that `run=` takes."""
Result = TypeVar("Result", bound=StageResult)


def train(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> TrainingResult:
    """Trains a run, or continues it from its last checkpoint. If the run is finished, returns its result at once.

    `overrides` are the arguments of the command line, such as `["method.rank=4", "steps=20"]`. `config_dir` is a
    folder with your own yaml files, like --config-dir.

    Ctrl-C or an interruption of the kernel raises KeyboardInterrupt, and SIGTERM raises errors.Interrupted, both after
    the last step has been saved; the same call continues from there. A second interruption raises at once. Other errors
    are those of trainer.core.errors: UsageError, DataError, OutOfMemoryError and so on.
    """
    return _execute("train", TrainingResult, overrides, config_dir)


def sample(
    overrides: Sequence[str] = (),
    *,
    run: RunName | None = None,
    prompts: str | Sequence[str] | None = None,
    images: str | Path | Sequence[str | Path] | None = None,
    config_dir: str | Path | None = None,
) -> SamplingResult:
    """Generates images with the best weights of a run: for `prompts`, or for held-out samples if there are none.

    `images` are the control images, one for all prompts or one for each. `run`, `prompts` and `images` may be
    overrides too: `run=...`, `sample.prompts=[...]` and `sample.images=[...]`. Raises errors like `train`.
    """
    values = {"run": _folder(run), "sample.prompts": _texts(prompts), "sample.images": _texts(images)}
    return _execute("sample", SamplingResult, overrides, config_dir, values)


def evaluate(
    overrides: Sequence[str] = (), *, run: RunName | None = None, config_dir: str | Path | None = None
) -> EvaluationResult:
    """Measures the best weights of a run on held-out samples. Raises errors like `train`."""
    return _execute("evaluate", EvaluationResult, overrides, config_dir, {"run": _folder(run)})


def _execute(
    stage: str,
    result_class: type[Result],
    overrides: Sequence[str],
    config_dir: str | Path | None,
    values: Mapping[str, str | list[str] | None] | None = None,
) -> Result:
    """Composes a run from the overrides and from `values` (None: not set), executes it and returns its result."""
    arguments = [*_check_overrides(stage, overrides), f"stage={stage}"]
    flags = [] if config_dir is None else ["--config-dir", str(config_dir)]
    with (
        _public_errors(),
        full_disk_errors(),
        _quiet_logging(),
        Signals(exits=False) as signals,
        ExitStack() as deferral,
    ):
        # Hydra and OmegaConf may lose or change an exception that a signal raises inside them.
        deferral.enter_context(signals.deferred())
        from trainer.config import command_line
        from trainer.config.request import requested_run
        from trainer.training.run_folder import find_run_folder

        arguments += [
            command_line.to_override(key, value) for key, value in (values or {}).items() if value is not None
        ]
        request = requested_run(command_line.parse([*flags, *arguments]), find_run_folder)
        if request is None:
            raise UsageError(
                "A sweep cannot be started from Python: type python -m trainer and the same settings in a terminal "
                f"(in a notebook after !), or call trainer.{stage}() in a loop."
            )
        deferral.close()
        from trainer.run import execute

        result = execute(request.run, signals, request.overrides)
    assert isinstance(result, result_class)
    return result


def _check_overrides(stage: str, overrides: Sequence[str]) -> list[str]:
    """Returns the overrides as a list. Raises errors.UsageError."""
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides):
        raise UsageError(f'Overrides are a list of strings: type trainer.{stage}(["method.rank=4", "steps=20"]).')
    for text in overrides:
        if text.startswith("-"):
            raise UsageError(
                f"{text.partition('=')[0]}: flags belong to the command line. Type settings only, and "
                "config_dir=FOLDER for your own yaml files."
            )
        if text.lstrip("+").partition("=")[0] == "stage":
            raise UsageError(f"{text}: trainer.{stage}() sets the stage; leave it out.")
    return list(overrides)


def _folder(run: RunName | None) -> str | None:
    """Returns the folder or id of a run as a string."""
    return None if run is None else str(run.folder if isinstance(run, TrainingResult) else run)


def _texts(values: str | Path | Sequence[str | Path] | None) -> list[str] | None:
    """Returns one or several values as a list of strings."""
    if values is None:
        return None
    return [str(value) for value in ([values] if isinstance(values, str | Path) else values)]


@contextmanager
def _public_errors() -> Iterator[None]:
    """Raises Ctrl-C as KeyboardInterrupt and a missing package as errors.InstallationError.

    Removes secrets from messages, because notebooks are saved with their output.
    """
    try:
        yield
    except Interrupted as stop:
        if stop.code == Interrupted.CTRL_C:
            raise KeyboardInterrupt(str(stop)) from None
        raise
    except ModuleNotFoundError as error:
        if reason := missing_package(error):
            raise reason from error
        raise
    except TrainerError as error:
        error.args = tuple(redaction.redact(str(value)) for value in error.args)
        raise


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """Inside the block, a log that cannot be written prints no traceback for each message."""
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        logging.raiseExceptions = before
