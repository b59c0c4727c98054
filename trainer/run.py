"""One run from its settings to its pictures, top to bottom: the only file that knows every room."""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import config, dataset, files, secret, shards, streams, sweep
from trainer.check import cut, enlarged
from trainer.check import data as report_data
from trainer.checkpoint import Checkpoints, Loaded
from trainer.config import Run, Stage
from trainer.encoding import encode
from trainer.errors import BadData, Ending, Interrupted, Numerics, OutOfMemory, Storage, Usage, is_out_of_memory
from trainer.material import Material, prepare, views
from trainer.place import CHECKPOINTS, SUMMARY, Place, claim
from trainer.processes import Processes, rank_and_count
from trainer.report import Progress, say, size
from trainer.rows import Row, conditions
from trainer.signals import Signals

if TYPE_CHECKING:
    import torch

    from trainer import tracking
    from trainer.dataset.view import View
    from trainer.loader import Batches
    from trainer.loop import Step
    from trainer.tracking.journal import Journal


def execute(run: Run, signals: Signals, overrides: list[str]) -> float | None:
    """Carry out the run's stage; the held-out loss where it has one."""
    with _room(run):
        return _execute(run, signals, overrides)


def _execute(run: Run, signals: Signals, overrides: list[str]) -> float | None:
    if run.stage is Stage.train:
        processes = Processes(signals, lambda: config.open_device(run))
        if processes.sharded:
            config.check_sharded(run)
        with processes:
            return train(run, processes.first(lambda: prepare(run)), signals, processes, overrides)
    if rank_and_count()[0] > 0:
        # Only training is divided.
        return None
    if run.stage in config.LOADED_STAGES:
        from trainer import finished

        return finished.execute(run)
    material = prepare(run)
    if run.stage is Stage.check:
        check(run, material)
    else:
        fill_cache(run, material)
    return None


def fill_cache(run: Run, material: Material) -> None:
    """Make what this run needs, drop what no run uses where that was asked for, and say how large the cache is."""
    cache, wanted = material.cache, views(run, material)
    made = encode(run, material, wanted)
    say(f"cache {cache.root}: " + ", ".join(f"{count} {name} made" for name, count in made.items()))
    if run.cache.drop_unused:
        count, freed = cache.drop_unused(wanted)
        say(f"dropped {count} entries that no run uses: {size(freed)}")
    sizes = cache.sizes()
    for part, (count, space) in sizes.items():
        say(f"{part:12}{count} entries, {size(space)}")
    say(f"{'in all':12}{sum(count for count, _ in sizes.values())} entries, {size(sum(space for _, space in sizes.values()))}")


def check(run: Run, material: Material) -> None:
    """Print what would be trained; no weights are loaded."""
    from trainer.method import trained
    from trainer.network import foresee

    foresee(run)
    network = run.model.skeleton()
    run.method.attach(network, run.model.targets, run.seed)
    whole, training = (sum(p.numel() for p in group) for group in (network.parameters(), trained(network).values()))
    micro_batch = run.hardware.micro_batch_for(run.batch, whole)
    steps, cache = total_steps(run, material), material.cache
    wanted = views(run, material)
    missing = cache.missing(wanted)
    # Entries are in float32 at most; a checkpoint holds weights and two moments each.
    bytes_missing = sum(4 * math.prod(shapes(run, view).get(part.name, ())) for part, view in missing)
    kept = (run.save.keep + 1) * training * 4 * (3 + bool(run.ema))
    say(f"identity    {config.identity(run)}  (folder {Path(run.out) / config.identity(run)})")
    say(f"model       {run.model.path}: {whole:,} parameters with {type(run.method).__name__.lower()}, of which {training:,} train")
    say(
        f"training    {steps} steps of {run.batch}: {steps * run.batch / len(material.visited):.1f} epochs; "
        f"{-(-run.batch // micro_batch)} micro-batch(es) of up to {micro_batch}"
    )
    say(
        f"optimizer   {config.option(run.optimizer)}, learning rate {run.optimizer.lr:g}, {config.option(run.lr_scheduler)}, warm-up {run.lr_scheduler.warmup}"
    )
    say(f"precision   {in_types(run)}")
    say(f"cache       {cache.root}: {len(missing)} entries to make, up to {size(bytes_missing)}")
    say(f"checkpoints up to {size(kept)} for {run.save.keep} and the best")
    for remark in run.model.remarks():
        say(f"remark      {remark}")
    report_data(run, material)


def in_types(run: Run) -> str:
    """Which types the weights have, and the products of a step."""
    products = f"products in {run.precision.compute.value}"
    if run.method.is_adapter:
        return f"frozen weights {run.precision.storage.name}, {products}, what trains float32"
    weights = str(run.method.dtype(run.precision.dtype())).removeprefix("torch.")
    return f"all weights train and are kept in {weights}, {products}"


def shapes(run: Run, view: View) -> dict[str, tuple[int, ...]]:
    """The shapes of what is cached of a view."""
    return run.model.spec(view.height, view.width, [view.size(name)[::-1] for name in view.controls])


def train(run: Run, material: Material, signals: Signals, processes: Processes, overrides: list[str]) -> float | None:
    """Train, or continue from the last checkpoint; the last held-out loss."""
    import yaml

    from trainer.network import foresee
    from trainer.tracking.journal import Journal

    # Of several processes the main one alone has these.
    place: Place | None = None
    journal: Journal | None = None

    def begin() -> dict[str, Any] | None:
        """Make the run's folder ours and fill the cache; of a run that is finished what its summary says."""
        nonlocal place, journal
        place = claim(run, material.digests, stack)
        sweep.tell(place.folder)
        if place.finished:
            summary = files.read_json(place.folder / SUMMARY)
            say(f"{place.folder} is finished ({summary['steps']} steps); nothing to do. Type fresh=true to run it again in a new folder.")
            show_what_lacks(run, place, overrides)
            return summary
        foresee(run, begins=not (place.folder / CHECKPOINTS).exists())
        journal = stack.enter_context(Journal(place.folder))
        stack.enter_context(_logged(place.folder, journal))
        # Once more, so that journal and log tell it in the same words.
        stack.enter_context(_room(run))
        files.write(place.folder / "config.yaml", yaml.safe_dump(config.plain(run), sort_keys=False))
        wanted = views(run, material)
        material.cache.keep_for(place.folder, wanted)
        made = encode(run, material, wanted)
        say("cache: " + (", ".join(f"{count} {name} made" for name, count in made.items() if count) or "has all"))
        if faults := material.listing.faults:
            journal.event("left_out", faults=faults)
            say(f"left out: {material.listing.counted(dataset.where(run.dataset))}; the journal lists them, and so does stage=check")
        for note in (*material.listing.notes, *enlarged(material, material.split.train), *cut(run, material.split.train)):
            say(f"note: {note}")
        return None

    if processes.led(lambda: material.digests) != material.digests:
        raise Usage("the processes see different data or weights; give all of them the same files")
    with ExitStack() as stack:
        finished = processes.led(begin)
        if finished:
            return finished["last_val_loss"]
        return Training(run, material, place, journal, signals, processes).go(overrides)


class Training:
    """The live state of one attempt at a run; `place` and `journal` are those of the main process."""

    def __init__(self, run: Run, material: Material, place: Place | None, journal: Journal | None, signals: Signals, processes: Processes):
        from trainer.judge import Judge
        from trainer.method import trained
        from trainer.network import build

        self.run, self.material, self.place, self.journal = run, material, place, journal
        self.signals, self.processes = signals, processes
        self.steps = total_steps(run, material)
        self.every = run.evaluation.every or max(10, self.steps // 4)
        self.device = config.open_device(run)
        self.network = processes.build(lambda divide: build(run, self.device, divide))
        self.trained = trained(self.network)
        self.optimizer = run.optimizer.live(self.trained.values(), run.seed)
        # What besides weights and optimizer a resumed run must know: the step last evaluated, its loss, the best and how long it is ago, how
        # many steps in a row were not finite.
        self.state: dict[str, Any] = {"evaluated": None, "val_loss": None, "best": None, "since_best": 0, "skipped": 0}
        loaded = self._restored()
        self.step = loaded.step if loaded else 0
        # The step whose checkpoint has all that is known of it.
        self.saved = self.step
        self.average = self._average(loaded) if run.ema and (processes.main or processes.sharded) else None
        self.loss_scale = run.precision.loss_scale(self.state.get("loss_scale"))
        self.judge = Judge(run, material, self.network, self.device, self.average, may_halve=not processes.sharded)

    def go(self, overrides: list[str]) -> float | None:
        """Train to the end, journaling, evaluating and saving on the way."""
        if not self.processes.main:
            return self._accompany()
        run = self.run
        self._begin()
        with shown(run, self.place, self.journal, overrides), Progress(self.steps, self.step, run.batch) as progress:
            try:
                self._save_if_due(self._evaluate_if_due())
                for done in self._steps():
                    self.step = done.number
                    speed = progress.step(done)
                    if done.finite and (self.step % run.log.every == 0 or self.step == self.steps):
                        self._log(done, speed)
                    self.processes.stop_if_asked()
                    with progress.paused():
                        self._save_if_due(self._evaluate_if_due())
                    if self._out_of_patience():
                        break
                self.processes.led(self._finish)
            except Interrupted as stop:
                self._save()
                self._sum_up("stopped", str(stop))
                say(f"{stop}: saved at step {self.step} of {self.steps}. The same command continues from there.")
                raise
        return self.state["val_loss"]

    def _accompany(self) -> float | None:
        """`go` as it is for the processes that only train: the same meetings in the same order."""
        try:
            self._save_if_due(self._evaluate_if_due())
            for done in self._steps():
                self.step = done.number
                self.processes.stop_if_asked()
                self._save_if_due(self._evaluate_if_due())
                if self._out_of_patience():
                    break
        except Interrupted:
            self._save()
            raise
        self.processes.led(self._finish)
        return self.state["val_loss"]

    def warn(self, text: str) -> None:
        """Say it, and keep it in the journal."""
        if self.journal:
            self.journal.event("warning", text=text)
        say(text)

    # The pieces, in the order of their use

    def _restored(self) -> Loaded | None:
        """The newest good checkpoint (of the parent, where this run only begins), which weights and optimizer now are."""
        from trainer.network import begin_from, fill

        run, loaded = self.run, None

        def find() -> tuple[str, int] | None:
            """The folder of the checkpoints and the step of the one to begin with."""
            nonlocal loaded
            folder, parent = self.place.folder / CHECKPOINTS, self.place.parent
            self.checkpoints = Checkpoints(folder, run.save.keep, self.warn)
            self.checkpoints.clean()
            loaded = self.checkpoints.newest()
            if loaded is None and parent is not None:
                folder = parent / CHECKPOINTS
                loaded = Checkpoints(folder, run.save.keep, self.warn).newest(set_aside=False)
            return loaded and (str(folder.absolute()), loaded.step)

        found = self.processes.led(find)
        if found and not loaded:
            loaded = Checkpoints(Path(found[0]), run.save.keep, say).load(found[1])
        if loaded is not None:
            fill(self.trained, loaded.weights, Path(found[0]))
            self.optimizer.load_state_dict(shards.parts(loaded.optimizer, list(self.trained.values())))
            self.state |= loaded.state
            say(f"continuing at step {loaded.step} of {self.steps}")
        elif run.method.init_from is not None:
            begin_from(run, self.network)
        return loaded

    def _average(self, loaded: Loaded | None) -> dict[str, torch.Tensor]:
        source = loaded.ema if loaded and loaded.ema else self.trained
        return {name: shards.part(source[name].detach().float().clone().to(self.device), like) for name, like in self.trained.items()}

    def _begin(self) -> None:
        """Note where and with what this attempt runs."""
        from trainer.report import provenance

        run, split = self.run, self.material.split
        training = sum(parameter.numel() for parameter in self.trained.values())
        counts = f"{self.steps} steps of {run.batch}, {len(split.train)} samples, {len(split.validation)} held out, {training:,} parameters train"
        several = f" in {self.processes.count} processes" if self.processes.count > 1 else ""
        several += ", which hold a part of the network each" if self.processes.sharded else ""
        say(f"{self.place.folder}: {counts}, on {self.device}{several}")
        say(f"precision: {in_types(run)}")
        for remark in run.model.remarks():
            self.warn(remark)
        number = 1 + self.journal.counts["attempt"]
        self.journal.event("attempt", number=number, start=self.step, counts=counts, machine=provenance(self.device))

    def _steps(self) -> Iterator[Step]:
        from trainer.loader import Batches, load
        from trainer.loop import fit

        run, material = self.run, self.material
        if self._out_of_patience():
            return iter(())
        self.network.train()
        micro_batch = run.hardware.micro_batch_for(run.batch, sum(p.numel() for p in self.network.parameters()))
        rank, count = self.processes.rank, self.processes.count
        batches = Batches(
            material.visited,
            material.cache,
            run.model,
            run.dataset,
            material.framing,
            run.seed,
            run.batch,
            micro_batch,
            rank,
            count,
            material.weighted,
        )
        steps = fit(
            list(self.trained.values()),
            self._losses,
            self._even(batches, load(batches, self.step, self.steps, run.hardware.workers)),
            self.optimizer,
            lambda step: run.optimizer.lr * run.lr_scheduler.factor(step, self.steps),
            self.signals.until_released,
            batch=run.batch,
            max_grad_norm=run.max_grad_norm,
            # Each process drops out other entries.
            seed=run.seed if rank == 0 else streams.number(run.seed, "process", rank),
            average=list(self.average.values()) if self.average else None,
            decay=run.ema or 0.0,
            loss_scale=self.loss_scale,
            reduce=self.processes.reduce if self.processes.count > 1 else None,
            may_halve=not self.processes.sharded,
        )
        return self.processes.steps(self._watched(steps, batches))

    def _watched(self, steps: Iterator[Step], batches: Batches) -> Iterator[Step]:
        """The same steps, with a word where memory was short; raises errors.Numerics where too many in a row are not finite."""
        for done in steps:
            if done.micro_batch is not None:
                self.warn(
                    f"Memory was short at step {done.number}: from now on {done.micro_batch} sample(s) a forward pass, and more of them; noise "
                    f"and result are the same. hardware.micro_batch={done.micro_batch} begins so."
                )
            self.state["skipped"] = 0 if done.finite else self.state["skipped"] + 1
            if not done.finite:
                self._endure(done, batches.of_all(done.number))
            yield done

    def _endure(self, done: Step, samples: list[str]) -> None:
        """Write down a step that is not finite; raises errors.Numerics where it is one more in a row than may be skipped."""
        values = {"loss": done.loss, "grad_norm": done.grad_norm}
        if self.processes.main:
            self.journal.event("not_finite", step=done.number, samples=samples, **values)
        more = f" and {len(samples) - 16} more" if len(samples) > 16 else ""
        text = (
            f"At step {done.number} the loss is {done.loss} and the gradient norm {done.grad_norm}; nothing was updated with them. "
            f"The samples of this step: {', '.join(samples[:16])}{more}."
        )
        skipped, most = self.state["skipped"], self.run.skip_nonfinite
        if skipped > most:
            raise Numerics(
                f"{text} The usual remedy is a lower optimizer.lr; skip_nonfinite={most + 1} and the same command skips "
                f"{'such a step' if most == 0 else f'{most + 1} of them in a row'} and goes on."
            )
        self.warn(f"{text} It is skipped, as up to {most} in a row are.")

    def _even(self, batches: Batches, steps: Iterator[tuple[int, list[Row]]]) -> Iterator[tuple[int, list[Row]]]:
        """The same; of a sharded network with as many micro-batches as the process with the most has: in each forward pass all take part."""
        for step, micro_batches in steps:
            if self.processes.sharded and (lacking := self.processes.most(len(micro_batches)) - len(micro_batches)):
                micro_batches += [batches.idle(step)] * lacking
            yield step, micro_batches

    def _losses(self, row: Row) -> torch.Tensor:
        """The loss of each sample of a micro-batch, (b,)."""
        row = {name: tensor.to(self.device, non_blocking=True) for name, tensor in row.items()}
        clean, noise, times = row["latents"].float(), row["noise"], row["time"]
        objective = self.run.model.objective
        prediction = self.judge.predict(objective.noised(clean, noise, times), times, conditions(row))
        losses = objective.losses(prediction, clean, noise, times, row.get("weight"))
        return losses * row["counts"] if "counts" in row else losses

    def _log(self, done: Step, speed: dict[str, float]) -> None:
        from trainer.hardware import memory

        values = {"train/loss": done.loss, "train/grad_norm": done.grad_norm, "train/lr": done.lr}
        if (effective := self.run.optimizer.effective_lr(self.optimizer)) is not None:
            values["train/lr_effective"] = effective
        if self.loss_scale is not None:
            values["train/loss_scale"] = self.loss_scale.value
        self.journal.metrics(done.number, values | speed | memory(self.device))

    def _evaluate_if_due(self) -> bool:
        """Evaluate each step that asks for it once, however often the run is resumed there; whether it is the best so far."""
        state = self.state
        if (self.step % self.every == 0 or self.step == self.steps) and state["evaluated"] != self.step:
            loss = self.processes.together(
                lambda: self.judge.evaluate(self.step, self.place.folder, self.journal), lambda: self.judge.accompany()
            )
            best = loss is not None and math.isfinite(loss) and (state["best"] is None or loss < state["best"])
            news = {"best": loss, "since_best": 0} if best else {"since_best": state["since_best"] + 1}
            state |= {"evaluated": self.step, "val_loss": loss} | news
            if self.step == self.saved > 0:
                # Saved by a stop in the midst of this evaluation, without what it found.
                self.saved = -1
            self.network.train()
            return best
        return False

    def _out_of_patience(self) -> bool:
        patience = self.run.evaluation.patience
        return patience is not None and self.state["since_best"] >= patience

    def _save_if_due(self, is_best: bool) -> None:
        ends = self.step == self.steps or self._out_of_patience()
        if self.step % self.run.save.every == 0 or is_best or ends:
            self._save(or_later=not ends)

    def _save(self, or_later: bool = False) -> None:
        """Commit the last finished step; before the first of this attempt there is nothing new to keep. Where the disk does not take it,
        training may go on if another save comes later."""
        if self.step == self.saved:
            return
        current = self.state | ({} if self.state["evaluated"] == self.step else {"val_loss": None})
        if self.loss_scale is not None:
            current["loss_scale"] = vars(self.loss_scale)
        weights = {name: parameter.detach() for name, parameter in self.trained.items()}
        kept = self.processes.gathered({"weights": weights, "optimizer": self.optimizer.state_dict(), "average": self.average})
        with self.signals.held():
            try:
                if self.processes.main:
                    self.checkpoints.save(self.step, kept["weights"], kept["optimizer"], kept["average"], current)
            except Storage as error:
                # The others have given their parts once, and would not for another try at this step.
                if not or_later or self.processes.sharded:
                    raise
                self.warn(f"{error} Training goes on; until the next save there is only what was saved at step {self.saved}.")
                return
            self.saved = self.step
            if self.processes.main:
                self.journal.event("checkpoint", step=self.step)

    def _finish(self) -> None:
        from trainer import export, tracking
        from trainer.hardware import memory
        from trainer.network import weights_of

        folder, refusal = self.place.folder, None
        how = "done" if self.step == self.steps else "stopped early"
        exported: list[Path] = []
        try:
            # First, for a run that dies meanwhile must not count as finished.
            exported = export.after_training(self.run, self.network, self.trained, weights_of(folder)[1], folder / "export")
        except (BadData, Usage) as error:
            # An adapter that changes nothing is no result, but the run is finished all the same.
            refusal = error
        self.journal.event("finished", step=self.step, how=how)
        self._sum_up("finished", how)
        best, last = self.state["best"], self.state["val_loss"]
        say(f"{how} at step {self.step}" + (f": held-out loss {last:.4f}, best {best:.4f}" if last is not None else ""))
        used = {name.removeprefix("system/").removesuffix("_gib"): value for name, value in memory(self.device).items()}
        say(", ".join(f"{name.replace('_', ' ')} {value:.2f} GiB" for name, value in used.items()))
        say(f"pictures {folder / 'pictures'}, curves {folder / 'training_curves.png'}")
        if where := tracking.page(self.run.tracking, Path(self.run.out)):
            say(f"compare runs: {where}")
        for path in exported:
            say(f"exported {path}")
        if refusal:
            raise refusal

    def _sum_up(self, status: str, how: str) -> None:
        """The tables and curves beside the run."""
        from trainer.tracking import curves

        folder, state = self.place.folder, self.state
        curves.write_metrics_csv(folder)
        curves.draw_curves(folder)
        losses = {"best_val_loss": state["best"], "last_val_loss": state["val_loss"]}
        curves.write_summary(folder, {"status": status, "how": how, "id": self.place.id, "steps": self.step, **losses})


def shown(run: Run, place: Place, journal: Journal, overrides: list[str]) -> tracking.Sink:
    """A context in which MLflow (or what else tracks) follows the journal, whose last attempt it describes."""
    from trainer import report, tracking

    attempt = [record for record in journal.records() if record["kind"] == "attempt"][-1]
    settings = config.flat(place.manifest["settings"])
    return tracking.open_sink(
        run.tracking,
        Path(run.out),
        place.folder,
        journal,
        name=report.name_of(run, place.id, overrides),
        params={name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()},
        tags=report.tags(run, place.folder, place.id, place.manifest, attempt["number"], attempt["machine"]),
        description=report.description(run, place.folder, attempt["counts"]),
        parent=sweep.parent(),
    )


def show_what_lacks(run: Run, place: Place, overrides: list[str]) -> None:
    """A run that finished while MLflow was away is shown when it is back."""
    from trainer import tracking
    from trainer.tracking.journal import Journal
    from trainer.tracking.sink import is_complete

    if isinstance(run.tracking, tracking.MLflow) and not is_complete(place.folder):
        with Journal(place.folder) as journal, shown(run, place, journal, overrides):
            say("sending to MLflow what it lacks of this run")


def total_steps(run: Run, material: Material) -> int:
    """`steps`, or `epochs` x samples / batch rounded up."""
    return run.steps or -(-run.epochs * len(material.visited) // run.batch)


@contextmanager
def _room(run: Run) -> Iterator[None]:
    """For a block in which memory may not suffice, of whatever kind. Raises errors.OutOfMemory with what to type."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise OutOfMemory(
            f"There is not enough memory, not even for one sample at a time ({reason}). What helps, the cheapest first: "
            f"{'; '.join(config.remedies(run))}. A setting that changes the result makes a run of its own."
        ) from error


@contextmanager
def _logged(folder: Path, journal: Journal) -> Iterator[None]:
    """With a log file in the run's folder, which gets the traceback of whatever ends the run. The program's own warnings are shown too."""
    handler = logging.FileHandler(folder / "log.txt")
    handler.setFormatter(secret.Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    shown = logging.StreamHandler()
    shown.setLevel(logging.WARNING)
    shown.setFormatter(secret.Redacting("%(message)s"))
    logger, ours = logging.getLogger(), logging.getLogger("trainer")
    logger.addHandler(handler)
    ours.addHandler(shown)
    ours.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        how = "stopped" if isinstance(error, Interrupted) else "failed"
        journal.event(how, reason=secret.redacted(str(error)) or type(error).__name__)
        handler.stream.write(secret.redacted(traceback.format_exc()))
        if not isinstance(error, Ending | Interrupted | KeyboardInterrupt | SystemExit):
            error.add_note(f"log: {folder / 'log.txt'}")
        raise
    finally:
        ours.removeHandler(shown)
        logger.removeHandler(handler)
        handler.close()
