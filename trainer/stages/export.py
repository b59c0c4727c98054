"""`stage=export`: writes the best weights of a run for other programs."""

from __future__ import annotations

from trainer.config.schema import Run
from trainer.core.console import print_line
from trainer.training.trained_run import load_trained_run


def execute(run: Run) -> None:
    """Writes the formats of `export.formats` to `<run>/export`."""
    from trainer.export.write import write_exports

    trained = load_trained_run(run)
    for path in write_exports(run, trained.network, trained.weights, trained.folder / "export"):
        print_line(f"exported step {trained.step} to {path}")
