"""The stages that work on a run that is there, with that run's own settings: evaluate, sample, export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.identity import to_plain
from trainer.config.rules import open_device
from trainer.config.schema import Run
from trainer.config.sections import SplitName, Stage
from trainer.core import files
from trainer.core.console import print_line
from trainer.core.digests import Digests
from trainer.core.errors import UsageError
from trainer.dataset.sample import Sample
from trainer.training.data import TrainingData, drawn, held_out, prepare, unconditional
from trainer.training.encoding import encode
from trainer.training.run_folder import find

if TYPE_CHECKING:
    from trainer.dataset.transform import TransformedSample
    from trainer.training.evaluator import Evaluator


def execute(run: Run) -> float | None:
    """Carry out `run.stage` on the run that `run.run` names, whose settings these are; for evaluate the held-out loss."""
    from trainer.export.write import write_exports
    from trainer.training.build import build, weights_of
    from trainer.training.evaluator import Evaluator

    folder = find(run.run, run.out)
    device = open_device(run)
    network = build(run, device)
    step, weights = weights_of(folder)
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    if run.stage is Stage.export:
        for path in write_exports(run, network, weights, folder / "export"):
            print_line(f"exported step {step} to {path}")
        return None
    material = prepare(run)
    judge = Evaluator(run, material, network, device, weights)
    if run.stage is Stage.evaluate:
        return evaluate(run, material, judge, folder, step)
    for path, caption in sample(run, material, judge, folder / "samples", step):
        print_line(f"{path}: {caption}")
    return None


def evaluate(run: Run, material: TrainingData, judge: Evaluator, folder: Path, step: int) -> float | None:
    """Held-out loss and pictures of the best weights, beside those before training; written to `<folder>/evaluation`."""
    from trainer.tracking.journal import Journal, read_records

    to_draw = [view for view, _ in drawn(run, material)]
    encode(run, material, held_out(run, material, run.evaluation.samples) + to_draw + unconditional(run, to_draw))
    where = folder / "evaluation" / f"step-{step:08d}"
    where.mkdir(parents=True, exist_ok=True)
    (where / "journal.jsonl").unlink(missing_ok=True)
    with Journal(where) as journal:
        loss = judge.evaluate(step, where, journal, before=folder)
        now = _metrics(journal.records())
    before = _metrics(record for _, record in read_records(folder / "journal.jsonl") if record.get("step") == 0)
    files.write_json(where / "evaluation.json", {"step": step, "now": now, "before_training": before})
    for name in ("val/loss", "val/psnr"):
        if name in now:
            print_line(
                f"{name} {now[name]:.4f} at step {step}"
                + (f", before training {before[name]:.4f}" if name in before else "")
            )
    print_line(f"pictures and evaluation.json in {where}")
    return loss


def _metrics(records: Iterator[dict]) -> dict[str, float]:
    return {name: value for record in records for name, value in record.get("values", {}).items()}


def sample(run: Run, material: TrainingData, judge: Evaluator, root: Path, step: int) -> Iterator[tuple[Path, str]]:
    """Pictures of `sample.prompts`, with `sample.images` as controls; without prompts of samples of the data set.

    What is asked for names the folder, so that nothing is overwritten, and a picture that is there already is not drawn again.
    """
    from trainer.dataset import image_grid

    views = _of_split(run, material) if run.sample.prompts is None else _prompted(run, material)
    request = {"step": step, "sample": to_plain(run.sample), "data": material.digests["data"]}
    name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    paths = [root / name / f"{i:05d}.png" for i in range(len(views))]
    files.write_json(root / name / "request.json", request | {"captions": [view.caption for view in views]})
    lacking = [i for i, path in enumerate(paths) if not path.exists()]
    wanted = [views[i] for i in lacking]
    encode(run, material, wanted + unconditional(run, wanted))
    for place, image in judge.draw(wanted, [run.sample.seed + i for i in lacking]):
        i = lacking[place]
        image_grid.save_png(paths[i], image)
        yield paths[i], views[i].caption
    if not lacking:
        print_line(f"all {len(paths)} pictures are in {root / name} already")


def _of_split(run: Run, material: TrainingData) -> list[TransformedSample]:
    side = run.sample.split
    if side is SplitName.validation:
        return held_out(run, material, run.sample.count or run.evaluation.images)
    samples = getattr(material.split, side.value)
    if not samples:
        raise UsageError(f"sample.split={side.value}: this data set has no such part; type sample.split=validation")
    count = run.sample.count or (len(samples) if side is SplitName.test else run.evaluation.images)
    return [material.transform.apply(sample) for sample in samples[:count]]


def _prompted(run: Run, material: TrainingData) -> list[TransformedSample]:
    from trainer.dataset.source import FileSource

    prompts, names = run.sample.prompts, run.sample.images or []
    if material.controls and not names:
        raise UsageError(
            "this run edits pictures: type sample.images=[FILE] beside sample.prompts, one for all prompts or one for each"
        )
    if names and not material.controls:
        raise UsageError("this run draws from prompts alone: leave sample.images out")
    digests = Digests(material.cache.root / "digests.sqlite")
    sources = [(FileSource(Path(name).expanduser(), digests),) for name in names] or [()]
    target = material.split.train[0].image
    samples = [Sample(f"prompt-{i}", target, prompt, sources[i % len(sources)]) for i, prompt in enumerate(prompts)]
    return [material.transform.apply(sample) for sample in samples]
