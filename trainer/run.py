"""Executes a run: picks its stage and calls it."""

from __future__ import annotations

from trainer.config.schema import Run
from trainer.config.sections import Stage
from trainer.core.ranks import rank_and_world_size
from trainer.core.signals import Signals
from trainer.stages import cache, check, evaluate, export, report, sample, train
from trainer.stages.results import StageResult
from trainer.training.out_of_memory import out_of_memory_errors


def execute(run: Run, signals: Signals, overrides: list[str]) -> StageResult | None:
    """Executes the stage of the run. Returns its result on the main process.

    None if the stage has no result (check, cache, export, report), and on the other processes.

    `overrides` are the `key=value` arguments of the command line.
    """
    with out_of_memory_errors(run):
        if run.stage is Stage.train:
            return train.execute(run, signals, overrides)
        if rank_and_world_size()[0] > 0:
            # Only training is distributed.
            return None
        match run.stage:
            case Stage.check:
                check.execute(run)
            case Stage.cache:
                cache.execute(run)
            case Stage.evaluate:
                return evaluate.execute(run, overrides)
            case Stage.sample:
                return sample.execute(run)
            case Stage.export:
                export.execute(run)
            case Stage.report:
                report.execute(run)
        return None
