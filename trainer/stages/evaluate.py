"""`stage=evaluate`: measures the best weights of a run and compares them with the network before training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trainer.config.schema import Run
from trainer.core import files
from trainer.core.console import print_line
from trainer.stages.results import EvaluationResult, strips
from trainer.tracking.journal import Journal, read_records
from trainer.training.data import held_out_samples, prepare, samples_to_generate, unconditional_samples
from trainer.training.encoding import encode_missing
from trainer.training.trained_run import load_trained_run


def execute(run: Run) -> EvaluationResult:
    """Writes measurements and images to `<run>/evaluation/step-...`."""
    trained = load_trained_run(run)
    data = prepare(run)
    generated = [sample for sample, _ in samples_to_generate(run, data)]
    held_out = held_out_samples(data, run.evaluation.samples)
    evaluator = trained.evaluator(data)
    encode_missing(run, data, held_out + generated + unconditional_samples(run, generated))

    folder = trained.folder / "evaluation" / f"step-{trained.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "journal.jsonl").unlink(missing_ok=True)
    with Journal(folder) as journal:
        measured = evaluator.evaluate(trained.step, folder, journal, before=trained.folder)
        now = _metrics(journal.records())
    records = (record for _, record in read_records(trained.folder / "journal.jsonl"))
    before = _metrics(record for record in records if record.get("step") == 0)
    values = {"step": trained.step, "now": now, "before_training": before}
    files.write_json(folder / "evaluation.json", values)

    for name in ("val/loss", "val/psnr"):
        if name in now:
            comparison = f", before training {before[name]:.4f}" if name in before else ""
            print_line(f"{name} {now[name]:.4f} at step {trained.step}{comparison}")
    print_line(f"images and evaluation.json in {folder}")
    images = strips(folder / "pictures" / folder.name)
    return EvaluationResult(trained.folder.name, folder, trained.step, measured.get("val/loss"), now, before, images)


def _metrics(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Returns the last value of each metric."""
    return {name: value for record in records for name, value in record.get("values", {}).items()}
