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

from trainer.config.groups import option_name
from trainer.config.identity import flatten, run_id, to_plain
from trainer.config.rules import check_sharded, memory_remedies, open_device
from trainer.config.schema import Run
from trainer.config.sections import POST_TRAINING_STAGES, Stage
from trainer.core import files, redaction, rng
from trainer.core.batch import Example, get_conditions
from trainer.core.console import format_bytes, print_line
from trainer.core.errors import (
    DataError,
    Interrupted,
    NonFiniteError,
    OutOfMemoryError,
    StorageError,
    TrainerError,
    UsageError,
    is_out_of_memory,
)
from trainer.core.ranks import rank_and_world_size
from trainer.core.signals import Signals
from trainer.distributed import sharding
from trainer.distributed.processes import Processes
from trainer.stages.check import cut, enlarged
from trainer.stages.check import data as report_data
from trainer.sweep.members import parent_run_id, report_folder
from trainer.training.checkpoint import Checkpoints
from trainer.training.checkpoint_format import Checkpoint as Loaded
from trainer.training.data import TrainingData, prepare, views
from trainer.training.encoding import encode
from trainer.training.provenance import Progress
from trainer.training.run_folder import CHECKPOINTS, SUMMARY, RunFolder, acquire

if TYPE_CHECKING:
    import torch

    from trainer.dataset.transform import TransformedSample
    from trainer.tracking.journal import Journal
    from trainer.tracking.tracker import Tracker
    from trainer.training.batches import Batches
    from trainer.training.loop import Step


def execute(run: Run, signals: Signals, overrides: list[str]) -> float | None:
    """Carry out the run's stage; the held-out loss where it has one."""
    with _room(run):
        return _execute(run, signals, overrides)


def _execute(run: Run, signals: Signals, overrides: list[str]) -> float | None:
    if run.stage is Stage.train:
        processes = Processes(signals, lambda: open_device(run))
        if processes.sharded:
            check_sharded(run)
        with processes:
            return train(run, processes.main_first(lambda: prepare(run)), signals, processes, overrides)
    if rank_and_world_size()[0] > 0:
        # Only training is divided.
        return None
    if run.stage in POST_TRAINING_STAGES:
        from trainer.stages import finished

        return finished.execute(run)
    material = prepare(run)
    if run.stage is Stage.check:
        check(run, material)
    else:
        fill_cache(run, material)
    return None


def fill_cache(run: Run, material: TrainingData) -> None:
    """Make what this run needs, drop what no run uses where that was asked for, and say how large the cache is."""
    cache, wanted = material.cache, views(run, material)
    made = encode(run, material, wanted)
    print_line(f"cache {cache.root}: " + ", ".join(f"{count} {name} made" for name, count in made.items()))
    if run.cache.drop_unused:
        count, freed = cache.drop_unused(wanted)
        print_line(f"dropped {count} entries that no run uses: {format_bytes(freed)}")
    sizes = cache.sizes()
    for part, (count, space) in sizes.items():
        print_line(f"{part:12}{count} entries, {format_bytes(space)}")
    print_line(
        f"{'in all':12}{sum(count for count, _ in sizes.values())} entries, {format_bytes(sum(space for _, space in sizes.values()))}"
    )


def check(run: Run, material: TrainingData) -> None:
    """Print what would be trained; no weights are loaded."""
    from trainer.method.trainable import trainable_parameters
    from trainer.training.build import foresee

    foresee(run)
    network = run.model.meta_model()
    run.method.attach(network, run.model.target_modules, run.seed)
    whole, training = (sum(p.numel() for p in group) for group in (network.parameters(), trainable_parameters(network).values()))
    micro_batch = run.hardware.micro_batch_for(run.batch, whole)
    steps, cache = total_steps(run, material), material.cache
    wanted = views(run, material)
    missing = cache.missing(wanted)
    # Entries are in float32 at most; a checkpoint holds weights and two moments each.
    bytes_missing = sum(4 * math.prod(shapes(run, view).get(name, ())) for name, view in missing)
    kept = (run.save.keep + 1) * training * 4 * (3 + bool(run.ema))
    print_line(f"identity    {run_id(run)}  (folder {Path(run.out) / run_id(run)})")
    print_line(
        f"model       {run.model.path}: {whole:,} parameters with {type(run.method).__name__.lower()}, of which {training:,} train"
    )
    print_line(
        f"training    {steps} steps of {run.batch}: {steps * run.batch / len(material.visited):.1f} epochs; "
        f"{-(-run.batch // micro_batch)} micro-batch(es) of up to {micro_batch}"
    )
    print_line(
        f"optimizer   {option_name(run.optimizer)}, learning rate {run.optimizer.lr:g}, {option_name(run.lr_scheduler)}, warm-up {run.lr_scheduler.warmup}"
    )
    print_line(f"precision   {in_types(run)}")
    print_line(f"cache       {cache.root}: {len(missing)} entries to make, up to {format_bytes(bytes_missing)}")
    print_line(f"checkpoints up to {format_bytes(kept)} for {run.save.keep} and the best")
    for remark in run.model.warnings():
        print_line(f"remark      {remark}")
    report_data(run, material)


def in_types(run: Run) -> str:
    """Which types the weights have, and the products of a step."""
    products = f"products in {run.precision.compute.value}"
    if run.method.is_adapter:
        return f"frozen weights {run.precision.storage.name}, {products}, what trains float32"
    weights = str(run.method.dtype(run.precision.dtype())).removeprefix("torch.")
    return f"all weights train and are kept in {weights}, {products}"


def shapes(run: Run, view: TransformedSample) -> dict[str, tuple[int, ...]]:
    """The shapes of what is cached of a view."""
    return run.model.shapes(view.height, view.width, [view.size(name)[::-1] for name in view.control_names])


def train(
    run: Run, material: TrainingData, signals: Signals, processes: Processes, overrides: list[str]
) -> float | None:
    """Train, or continue from the last checkpoint; the last held-out loss."""
    import yaml

    from trainer.tracking.journal import Journal
    from trainer.training.build import foresee

    # Of several processes the main one alone has these.
    place: RunFolder | None = None
    journal: Journal | None = None

    def begin() -> dict[str, Any] | None:
        """Make the run's folder ours and fill the cache; of a run that is finished what its summary says."""
        nonlocal place, journal
        place = acquire(run, material.digests, stack)
        report_folder(place.folder)
        if place.finished:
            summary = files.read_json(place.folder / SUMMARY)
            print_line(
                f"{place.folder} is finished ({summary['steps']} steps); nothing to do. Type fresh=true to run it again in a new folder."
            )
            send_missing_to_tracker(run, place, overrides)
            return summary
        foresee(run, begins=not (place.folder / CHECKPOINTS).exists())
        journal = stack.enter_context(Journal(place.folder))
        stack.enter_context(_logged(place.folder, journal))
        # Once more, so that journal and log tell it in the same words.
        stack.enter_context(_room(run))
        files.write(place.folder / "config.yaml", yaml.safe_dump(to_plain(run), sort_keys=False))
        wanted = views(run, material)
        material.cache.record_use(place.folder, wanted)
        made = encode(run, material, wanted)
        print_line(
            "cache: " + (", ".join(f"{count} {name} made" for name, count in made.items() if count) or "has all")
        )
        if faults := material.listing.faults:
            journal.log_event("left_out", faults=faults)
            print_line(
                f"left out: {material.listing.count_faults(run.dataset.describe())}; the journal lists them, and so does stage=check"
            )
        for note in (
            *material.listing.notes,
            *enlarged(material, material.split.train),
            *cut(run, material.split.train),
        ):
            print_line(f"note: {note}")
        return None

    if processes.run_on_main(lambda: material.digests) != material.digests:
        raise UsageError("the processes see different data or weights; give all of them the same files")
    with ExitStack() as stack:
        finished = processes.run_on_main(begin)
        if finished:
            return finished["last_val_loss"]
        return Training(run, material, place, journal, signals, processes).go(overrides)


class Training:
    """The live state of one attempt at a run; `place` and `journal` are those of the main process."""

    def __init__(
        self,
        run: Run,
        material: TrainingData,
        place: RunFolder | None,
        journal: Journal | None,
        signals: Signals,
        processes: Processes,
    ):
        from trainer.method.trainable import trainable_parameters
        from trainer.training.build import build
        from trainer.training.evaluator import Evaluator

        self.run, self.material, self.place, self.journal = run, material, place, journal
        self.signals, self.processes = signals, processes
        self.steps = total_steps(run, material)
        self.every = run.evaluation.every or max(10, self.steps // 4)
        self.device = open_device(run)
        self.network = processes.build_network(lambda divide: build(run, self.device, divide))
        self.trained = trainable_parameters(self.network)
        self.optimizer = run.optimizer.build(self.trained.values(), run.seed)
        # What besides weights and optimizer a resumed run must know: the step last evaluated, its loss, the best and how long it is ago, how
        # many steps in a row were not finite.
        self.state: dict[str, Any] = {"evaluated": None, "val_loss": None, "best": None, "since_best": 0, "skipped": 0}
        loaded = self._restored()
        self.step = loaded.step if loaded else 0
        # The step whose checkpoint has all that is known of it.
        self.saved = self.step
        self.average = self._average(loaded) if run.ema and (processes.is_main or processes.sharded) else None
        self.loss_scale = run.precision.loss_scale(self.state.get("loss_scale"))
        self.judge = Evaluator(run, material, self.network, self.device, self.average, may_halve=not processes.sharded)

    def go(self, overrides: list[str]) -> float | None:
        """Train to the end, journaling, evaluating and saving on the way."""
        if not self.processes.is_main:
            return self._accompany()
        run = self.run
        self._begin()
        with open_tracker(run, self.place, self.journal, overrides), Progress(self.steps, self.step, run.batch) as progress:
            try:
                self._save_if_due(self._evaluate_if_due())
                for done in self._steps():
                    self.step = done.number
                    speed = progress.step(done)
                    if done.finite and (self.step % run.log.every == 0 or self.step == self.steps):
                        self._log(done, speed)
                    self.processes.stop_if_signaled()
                    with progress.paused():
                        self._save_if_due(self._evaluate_if_due())
                    if self._out_of_patience():
                        break
                self.processes.run_on_main(self._finish)
            except Interrupted as stop:
                self._save()
                self._sum_up("stopped", str(stop))
                print_line(f"{stop}: saved at step {self.step} of {self.steps}. The same command continues from there.")
                raise
        return self.state["val_loss"]

    def _accompany(self) -> float | None:
        """`go` as it is for the processes that only train: the same meetings in the same order."""
        try:
            self._save_if_due(self._evaluate_if_due())
            for done in self._steps():
                self.step = done.number
                self.processes.stop_if_signaled()
                self._save_if_due(self._evaluate_if_due())
                if self._out_of_patience():
                    break
        except Interrupted:
            self._save()
            raise
        self.processes.run_on_main(self._finish)
        return self.state["val_loss"]

    def warn(self, text: str) -> None:
        """Say it, and keep it in the journal."""
        if self.journal:
            self.journal.log_event("warning", text=text)
        print_line(text)

    # The pieces, in the order of their use

    def _restored(self) -> Loaded | None:
        """The newest good checkpoint (of the parent, where this run only begins), which weights and optimizer now are."""
        from trainer.training.build import begin_from, fill

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

        found = self.processes.run_on_main(find)
        if found and not loaded:
            loaded = Checkpoints(Path(found[0]), run.save.keep, print_line).load(found[1])
        if loaded is not None:
            fill(self.trained, loaded.weights, Path(found[0]))
            self.optimizer.load_state_dict(sharding.shard_optimizer_state(loaded.optimizer, list(self.trained.values())))
            self.state |= loaded.state
            print_line(f"continuing at step {loaded.step} of {self.steps}")
        elif run.method.init_from is not None:
            begin_from(run, self.network)
        return loaded

    def _average(self, loaded: Loaded | None) -> dict[str, torch.Tensor]:
        source = loaded.ema if loaded and loaded.ema else self.trained
        return {
            name: sharding.shard_like(source[name].detach().float().clone().to(self.device), like)
            for name, like in self.trained.items()
        }

    def _begin(self) -> None:
        """Note where and with what this attempt runs."""
        from trainer.training.provenance import provenance

        run, split = self.run, self.material.split
        training = sum(parameter.numel() for parameter in self.trained.values())
        counts = f"{self.steps} steps of {run.batch}, {len(split.train)} samples, {len(split.validation)} held out, {training:,} parameters train"
        several = f" in {self.processes.world_size} processes" if self.processes.world_size > 1 else ""
        several += ", which hold a part of the network each" if self.processes.sharded else ""
        print_line(f"{self.place.folder}: {counts}, on {self.device}{several}")
        print_line(f"precision: {in_types(run)}")
        for remark in run.model.warnings():
            self.warn(remark)
        number = 1 + self.journal.counts["attempt"]
        self.journal.log_event("attempt", number=number, start=self.step, counts=counts, machine=provenance(self.device))

    def _steps(self) -> Iterator[Step]:
        from trainer.training.batches import Batches, load
        from trainer.training.loop import TrainingLoop

        run, material = self.run, self.material
        if self._out_of_patience():
            return iter(())
        self.network.train()
        micro_batch = run.hardware.micro_batch_for(run.batch, sum(p.numel() for p in self.network.parameters()))
        rank, count = self.processes.rank, self.processes.world_size
        batches = Batches(
            material.visited,
            material.cache,
            run.model,
            run.dataset,
            material.transform,
            run.seed,
            run.batch,
            micro_batch,
            rank,
            count,
            material.weighted,
        )
        loop = TrainingLoop(
            parameters=list(self.trained.values()),
            losses=self._losses,
            optimizer=self.optimizer,
            learning_rate=lambda step: run.optimizer.lr * run.lr_scheduler.factor(step, self.steps),
            uninterrupted=self.signals.deferred_until_release,
            batch_size=run.batch,
            max_grad_norm=run.max_grad_norm,
            # Each process drops out other entries.
            seed=run.seed if rank == 0 else rng.seed_for(run.seed, "process", rank),
            average=list(self.average.values()) if self.average else None,
            decay=run.ema or 0.0,
            loss_scale=self.loss_scale,
            reduce=self.processes.sum_gradients if self.processes.world_size > 1 else None,
            may_halve=not self.processes.sharded,
        )
        steps = loop.steps(self._pad_micro_batches(batches, load(batches, self.step, self.steps, run.hardware.workers)))
        return self.processes.guard_steps(self._monitor(steps, batches))

    def _monitor(self, steps: Iterator[Step], batches: Batches) -> Iterator[Step]:
        """The same steps, with a word where memory was short; raises errors.NonFiniteError where too many in a row are not finite."""
        for done in steps:
            if done.new_micro_batch_size is not None:
                self.warn(
                    f"Memory was short at step {done.number}: from now on {done.new_micro_batch_size} sample(s) a forward pass, and more of them; noise "
                    f"and result are the same. hardware.micro_batch={done.new_micro_batch_size} begins so."
                )
            self.state["skipped"] = 0 if done.finite else self.state["skipped"] + 1
            if not done.finite:
                self._handle_nonfinite_step(done, batches.of_all(done.number))
            yield done

    def _handle_nonfinite_step(self, done: Step, samples: list[str]) -> None:
        """Write down a step that is not finite; raises errors.NonFiniteError where it is one more in a row than may be skipped."""
        values = {"loss": done.loss, "grad_norm": done.grad_norm}
        if self.processes.is_main:
            self.journal.log_event("not_finite", step=done.number, samples=samples, **values)
        more = f" and {len(samples) - 16} more" if len(samples) > 16 else ""
        text = (
            f"At step {done.number} the loss is {done.loss} and the gradient norm {done.grad_norm}; nothing was updated with them. "
            f"The samples of this step: {', '.join(samples[:16])}{more}."
        )
        skipped, most = self.state["skipped"], self.run.skip_nonfinite
        if skipped > most:
            raise NonFiniteError(
                f"{text} The usual remedy is a lower optimizer.lr; skip_nonfinite={most + 1} and the same command skips "
                f"{'such a step' if most == 0 else f'{most + 1} of them in a row'} and goes on."
            )
        self.warn(f"{text} It is skipped, as up to {most} in a row are.")

    def _pad_micro_batches(
        self, batches: Batches, steps: Iterator[tuple[int, list[Example]]]
    ) -> Iterator[tuple[int, list[Example]]]:
        """The same; of a sharded network with as many micro-batches as the process with the most has: in each forward pass all take part."""
        for step, micro_batches in steps:
            if self.processes.sharded and (
                lacking := self.processes.max_over_ranks(len(micro_batches)) - len(micro_batches)
            ):
                micro_batches += [batches.idle(step)] * lacking
            yield step, micro_batches

    def _losses(self, row: Example) -> torch.Tensor:
        """The loss of each sample of a micro-batch, (b,)."""
        row = {name: tensor.to(self.device, non_blocking=True) for name, tensor in row.items()}
        clean, noise, times = row["latents"].float(), row["noise"], row["t"]
        objective = self.run.model.objective
        prediction = self.judge.predict(objective.add_noise(clean, noise, times), times, get_conditions(row))
        losses = objective.losses(prediction, clean, noise, times, row.get("weight"))
        return losses * row["loss_mask"] if "loss_mask" in row else losses

    def _log(self, done: Step, speed: dict[str, float]) -> None:
        from trainer.hardware.devices import memory_metrics

        values = {"train/loss": done.loss, "train/grad_norm": done.grad_norm, "train/lr": done.lr}
        if (effective := self.run.optimizer.effective_lr(self.optimizer)) is not None:
            values["train/lr_effective"] = effective
        if self.loss_scale is not None:
            values["train/loss_scale"] = self.loss_scale.value
        self.journal.log_metrics(done.number, values | speed | memory_metrics(self.device))

    def _evaluate_if_due(self) -> bool:
        """Evaluate each step that asks for it once, however often the run is resumed there; whether it is the best so far."""
        state = self.state
        if (self.step % self.every == 0 or self.step == self.steps) and state["evaluated"] != self.step:
            loss = self.processes.run_on_all(
                lambda: self.judge.evaluate(self.step, self.place.folder, self.journal), lambda: self.judge.follow()
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
        kept = self.processes.gather(
            {"weights": weights, "optimizer": self.optimizer.state_dict(), "average": self.average}
        )
        with self.signals.deferred():
            try:
                if self.processes.is_main:
                    self.checkpoints.save(self.step, kept["weights"], kept["optimizer"], kept["average"], current)
            except StorageError as error:
                # The others have given their parts once, and would not for another try at this step.
                if not or_later or self.processes.sharded:
                    raise
                self.warn(
                    f"{error} Training goes on; until the next save there is only what was saved at step {self.saved}."
                )
                return
            self.saved = self.step
            if self.processes.is_main:
                self.journal.log_event("checkpoint", step=self.step)

    def _finish(self) -> None:
        from trainer.export.write import export_after_training
        from trainer.hardware.devices import memory_metrics
        from trainer.training.build import weights_of

        folder, refusal = self.place.folder, None
        how = "done" if self.step == self.steps else "stopped early"
        exported: list[Path] = []
        try:
            # First, for a run that dies meanwhile must not count as finished.
            exported = export_after_training(self.run, self.network, weights_of(folder)[1], folder / "export")
        except (DataError, UsageError) as error:
            # An adapter that changes nothing is no result, but the run is finished all the same.
            refusal = error
        self.journal.log_event("finished", step=self.step, how=how)
        self._sum_up("finished", how)
        best, last = self.state["best"], self.state["val_loss"]
        print_line(
            f"{how} at step {self.step}" + (f": held-out loss {last:.4f}, best {best:.4f}" if last is not None else "")
        )
        used = {name.removeprefix("system/").removesuffix("_gib"): value for name, value in memory_metrics(self.device).items()}
        print_line(", ".join(f"{name.replace('_', ' ')} {value:.2f} GiB" for name, value in used.items()))
        print_line(f"pictures {folder / 'pictures'}, curves {folder / 'training_curves.png'}")
        if where := self.run.tracking.page(Path(self.run.out)):
            print_line(f"compare runs: {where}")
        for path in exported:
            print_line(f"exported {path}")
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


def open_tracker(run: Run, place: RunFolder, journal: Journal, overrides: list[str]) -> Tracker:
    """Returns the tracker of the run, a context manager that follows the journal and describes its last attempt."""
    from trainer.training import provenance

    attempt = [record for record in journal.records() if record["kind"] == "attempt"][-1]
    settings = flatten(place.manifest["settings"])
    return run.tracking.open(
        journal,
        Path(run.out),
        name=provenance.name_of(run, place.id, overrides),
        params={name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()},
        tags=provenance.tags(run, place.folder, place.id, place.manifest, attempt["number"], attempt["machine"]),
        description=provenance.description(run, place.folder, attempt["counts"]),
        parent=parent_run_id(),
    )


def send_missing_to_tracker(run: Run, place: RunFolder, overrides: list[str]) -> None:
    """Sends the rest of a finished run whose tracker did not answer when the run ended."""
    from trainer.tracking.journal import Journal

    if not run.tracking.is_complete(place.folder):
        with Journal(place.folder) as journal, open_tracker(run, place, journal, overrides):
            print_line("sending the rest of this run to the tracker")


def total_steps(run: Run, material: TrainingData) -> int:
    """`steps`, or `epochs` x samples / batch rounded up."""
    return run.steps or -(-run.epochs * len(material.visited) // run.batch)


@contextmanager
def _room(run: Run) -> Iterator[None]:
    """For a block in which memory may not suffice, of whatever kind. Raises errors.OutOfMemoryError with what to type."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise OutOfMemoryError(
            f"There is not enough memory, not even for one sample at a time ({reason}). What helps, the cheapest first: "
            f"{'; '.join(memory_remedies(run))}. A setting that changes the result makes a run of its own."
        ) from error


@contextmanager
def _logged(folder: Path, journal: Journal) -> Iterator[None]:
    """With a log file in the run's folder, which gets the traceback of whatever ends the run. The program's own warnings are shown too."""
    handler = logging.FileHandler(folder / "log.txt")
    handler.setFormatter(redaction.RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    shown = logging.StreamHandler()
    shown.setLevel(logging.WARNING)
    shown.setFormatter(redaction.RedactingFormatter("%(message)s"))
    logger, ours = logging.getLogger(), logging.getLogger("trainer")
    logger.addHandler(handler)
    ours.addHandler(shown)
    ours.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        how = "stopped" if isinstance(error, Interrupted) else "failed"
        journal.log_event(how, reason=redaction.redact(str(error)) or type(error).__name__)
        handler.stream.write(redaction.redact(traceback.format_exc()))
        if not isinstance(error, TrainerError | Interrupted | KeyboardInterrupt | SystemExit):
            error.add_note(f"log: {folder / 'log.txt'}")
        raise
    finally:
        ours.removeHandler(shown)
        logger.removeHandler(handler)
        handler.close()
