"""The stages that work on a run that is there, with that run's own settings: evaluate, sample, export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainer import config, files
from trainer.config import Run, Stage
from trainer.material import Material, encode, held_out, prepare
from trainer.place import find
from trainer.report import say


def execute(asked: Run) -> float | None:
    """Carry out `asked.stage` on `asked.run`; for evaluate the held-out loss."""
    from trainer.judge import Judge
    from trainer.method import trained
    from trainer.run import build, weights_of

    folder = find(asked.run, asked.out)
    run = loaded(asked, folder)
    device = run.hardware.open()
    network = build(run, device)
    parameters = trained(network)
    weights = {name: tensor.to(device) for name, tensor in weights_of(folder).items()}
    if run.stage is Stage.export:
        from trainer import export

        for path in export.write(run, network, parameters, weights, folder / "export"):
            say(f"exported {path}")
        return None
    material = prepare(run)
    judge = Judge(run, material, network, device, weights)
    if run.stage is Stage.sample:
        draw(run, material, judge, folder)
        return None
    return evaluate(run, material, judge, folder)


def loaded(asked: Run, folder: Path) -> Run:
    """The run's own settings, with those of `asked` that a finished run leaves free."""
    own = config.from_yaml(folder / "config.yaml")
    return config.resolved(replace(own, **{name: getattr(asked, name) for name in config.FREE_IN_LOADED_STAGES}))


def evaluate(run: Run, material: Material, judge, folder: Path) -> float | None:
    """Held-out loss and pictures of the best weights, written to `<folder>/evaluation`."""
    from trainer.material import drawn
    from trainer.tracking.journal import Journal

    encode(run, material, held_out(run, material, run.evaluation.samples) + [view for view, _ in drawn(run, material)])
    where = folder / "evaluation"
    where.mkdir(exist_ok=True)
    (where / "journal.jsonl").unlink(missing_ok=True)
    with Journal(where) as journal:
        loss = judge.evaluate(0, where, journal)
        values = next(record["values"] for record in journal.records() if "values" in record)
    files.write_json(where / "evaluation.json", values)
    for name in ("val/loss", "val/psnr"):
        if name in values:
            say(f"{name} {values[name]:.4f}")
    say(f"pictures and {where / 'evaluation.json'}")
    return loss


def draw(run: Run, material: Material, judge, folder: Path) -> None:
    """Pictures of `sample.prompts`, with `sample.images` as controls; without prompts of the held-out samples, as in training."""
    from trainer.cache import View
    from trainer.dataset import Sample, strip
    from trainer.dataset.picture import FileSource

    settings = run.sample
    digests = files.Digests(material.cache.root / "digests.sqlite")
    if settings.prompts is None:
        views = held_out(run, material, run.evaluation.images)
    else:
        images = [Path(name).expanduser() for name in settings.images or ()]
        controls = [(FileSource(images[i % len(images)], digests),) if images else () for i in range(len(settings.prompts))]
        views = [
            View(Sample(f"prompt-{i}", material.split.train[0].image, prompt, control), *material.size)
            for i, (prompt, control) in enumerate(zip(settings.prompts, controls, strict=True))
        ]
        lacking = material.controls and not images
        if lacking:
            from trainer.errors import Usage

            raise Usage("this run edits pictures: type sample.images=[FILE] beside sample.prompts, one for all prompts or one for each")
    encode(run, material, views)
    where = folder / "samples"
    for i, image in enumerate(judge.draw(views, [settings.seed + i for i in range(len(views))])):
        path = where / f"seed-{settings.seed}-{i:05d}.png"
        strip.save(path, image)
        say(f"{path}: {views[i].caption}")
