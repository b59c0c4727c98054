"""One attempt at a run, from the newest checkpoint to the end of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.rules import open_device
from trainer.config.schema import Run
from trainer.core.batch import Batch
from trainer.core.console import print_line
from trainer.core.errors import DataError, Interrupted, NonFiniteError, StorageError, UsageError
from trainer.core.rng import seed_for
from trainer.core.signals import Signals
from trainer.distributed.processes import Processes
from trainer.distributed.sharding import shard_optimizer_state
from trainer.method.trainable import set_train_mode, trainable_parameters
from trainer.training.average import initial_average, keeps_average, update_average
from trainer.training.batches import Batches
from trainer.training.build import build_network, copy_weights, load_initial_weights
from trainer.training.checkpoint import Checkpoints, load_best_weights
from trainer.training.data import TrainingData
from trainer.training.evaluator import Evaluator, evaluation_interval
from trainer.training.loader import load_batches
from trainer.training.loop import Step, TrainingLoop
from trainer.training.predictor import Predictor
from trainer.training.progress import Progress
from trainer.training.provenance import describe_environment
from trainer.training.recorder import Recorder
from trainer.training.state import TrainingState
from trainer.training.tracked_run import print_pages

if TYPE_CHECKING:
    import torch

    from trainer.training.checkpoint_format import Checkpoint


class Session:
    """One attempt at a run: the network, its optimizer, and how far training has come.

    Every process of the run has a session. Sessions make the same collective calls in the same order (see `Processes`).
    Only the main process has a recorder, and only it evaluates, saves and exports.
    """

    def __init__(self, run: Run, data: TrainingData, recorder: Recorder | None, signals: Signals, processes: Processes):
        assert run.batch is not None
        self.run, self.data, self.recorder, self.signals, self.processes = run, data, recorder, signals, processes
        self.batch_size = run.batch
        self.total_steps = data.total_steps(run)
        self.evaluation_interval = evaluation_interval(run, self.total_steps)
        self.device = open_device(run)
        self.network = processes.build_network(lambda shard: build_network(run, self.device, shard))
        self.parameters = trainable_parameters(self.network)
        self.optimizer = run.optimizer.build(self.parameters.values(), run.seed)
        checkpoint = self._restore()
        self.step = checkpoint.step if checkpoint else 0
        self.saved_step = self.step
        """Step of the last checkpoint that is fully up to date."""
        self.state = TrainingState.from_checkpoint(checkpoint.state) if checkpoint else TrainingState()
        self.average = self._initial_average(checkpoint)
        self.loss_scale = run.precision.loss_scale(self.state.loss_scale)
        self.predictor = Predictor(run, self.network, self.device)
        self.evaluator = Evaluator(run, data, self.predictor, self.average, may_halve=not processes.sharded)

    def train(self) -> None:
        """Trains to the end."""
        self._start_attempt()
        tracker = self.recorder.open_tracker() if self.recorder else nullcontext()
        hidden = self.recorder is None
        with tracker, Progress(self.total_steps, self.step, self.batch_size, hidden) as progress:
            try:
                with progress.paused():
                    self._save_if_due(self._evaluate_if_due(progress))
                for step in self._steps():
                    self.step = step.number
                    self._log(step, progress.advance(step))
                    self.processes.stop_if_signaled()
                    with progress.paused():
                        self._save_if_due(self._evaluate_if_due(progress))
                    if self._out_of_patience():
                        break
                progress.close()
                self.processes.run_on_main(self._finish)
            except Interrupted as stop:
                with progress.activity("saving"):
                    self._save()
                progress.close()
                if self.recorder:
                    self.recorder.stop_attempt(stop, self.step, self.total_steps, self.state)
                raise
        if self.recorder:
            # Not earlier: the tracker has everything only when it is closed.
            print_pages(self.run, self.recorder.folder)

    # Start

    def _restore(self) -> Checkpoint | None:
        """Loads the newest undamaged checkpoint of this run or its parent, else the initial weights.

        Returns the checkpoint, if there is one.
        """
        checkpoint: Checkpoint | None = None

        def find() -> tuple[str, int] | None:
            nonlocal checkpoint
            folder, checkpoint = self._main_recorder.newest_checkpoint()
            return (str(folder.absolute()), checkpoint.step) if checkpoint else None

        found = self.processes.run_on_main(find)
        if found is None:
            if self.run.method.init_from is not None:
                load_initial_weights(self.run, self.network)
            return None
        folder = Path(found[0])
        if checkpoint is None:
            checkpoint = Checkpoints(folder, self.run.save.keep, print_line).load(found[1])
        copy_weights(self.parameters, checkpoint.weights, folder)
        optimizer_state = shard_optimizer_state(checkpoint.optimizer, list(self.parameters.values()))
        self.optimizer.load_state_dict(optimizer_state)
        print_line(f"continuing at step {checkpoint.step} of {self.total_steps}")
        return checkpoint

    def _initial_average(self, checkpoint: Checkpoint | None) -> dict[str, torch.Tensor] | None:
        """Returns the average of the weights over the steps; None if this process does not keep one."""
        if not keeps_average(self.run) or not (self.processes.is_main or self.processes.sharded):
            return None
        source = checkpoint.ema if checkpoint and checkpoint.ema else self.parameters
        return initial_average(self.parameters, source)

    def _start_attempt(self) -> None:
        from trainer.hardware.devices import detect_card

        if self.recorder is None:
            return
        split, processes = self.data.split, self.processes
        parameter_count = sum(parameter.numel() for parameter in self.parameters.values())
        regularization = f"{len(split.regularization)} for regularization, " if split.regularization else ""
        counts = (
            f"{self.total_steps} steps of {self.batch_size}, {len(split.train)} samples, {regularization}"
            f"{len(split.validation)} held out, {parameter_count:,} trainable parameters"
        )
        location = f"on {self.device}"
        if processes.world_size > 1:
            location += f" in {processes.world_size} processes"
        if processes.sharded:
            location += ", each with a shard of the network"
        environment, memory = describe_environment(self.device), detect_card(self.device).memory_gib
        assert memory is not None, "the device is open"
        self.recorder.start_attempt(self.step, counts, location, environment, self.total_steps, memory)

    # Steps

    def _steps(self) -> Iterator[Step]:
        """Yields the remaining steps, each after its update."""
        if self._out_of_patience():
            return iter(())
        run, rank, world_size = self.run, self.processes.rank, self.processes.world_size
        set_train_mode(self.network)
        network_size = sum(parameter.numel() for parameter in self.network.parameters())
        lr = run.optimizer.lr
        assert lr is not None
        micro_batch_size = run.hardware.micro_batch_for(self.batch_size, network_size)
        batches = Batches(self.data.visits, self.data.cache, run.model, micro_batch_size, rank, world_size)
        loop = TrainingLoop(
            parameters=list(self.parameters.values()),
            losses=self.predictor.losses,
            optimizer=self.optimizer,
            learning_rate=lambda step: lr * run.lr_scheduler.factor(step, self.total_steps),
            batch_size=self.batch_size,
            max_grad_norm=run.max_grad_norm,
            # Each process has its own dropout masks.
            seed=run.seed if rank == 0 else seed_for(run.seed, "process", rank),
            uninterrupted=self.signals.deferred_until_release,
            update_average=(
                partial(update_average, run, self.average, self.parameters, self.optimizer) if self.average else None
            ),
            loss_scale=self.loss_scale,
            reduce=self.processes.sum_gradients if world_size > 1 else None,
            may_halve=not self.processes.sharded,
        )
        loaded = load_batches(batches, self.step, self.total_steps, run.hardware.workers, self.signals.deferred)
        steps = loop.steps(self._pad_micro_batches(batches, loaded))
        return self.processes.guard_steps(self._monitor(steps, batches))

    def _pad_micro_batches(
        self, batches: Batches, loaded: Iterator[tuple[int, list[Batch]]]
    ) -> Iterator[tuple[int, list[Batch]]]:
        """Pads with micro-batches that do not count: under FSDP all ranks must run equally many forward passes."""
        for step, micro_batches in loaded:
            if self.processes.sharded:
                missing = self.processes.max_over_ranks(len(micro_batches)) - len(micro_batches)
                if missing:
                    micro_batches = micro_batches + [batches.padding(step)] * missing
            yield step, micro_batches

    def _monitor(self, steps: Iterator[Step], batches: Batches) -> Iterator[Step]:
        """Yields the steps, and warns if memory was exhausted.

        Raises errors.NonFiniteError if too many consecutive steps are not finite.
        """
        for step in steps:
            if step.new_micro_batch_size is not None:
                self._warn(
                    f"Memory was exhausted at step {step.number}: from now on a forward pass has at most "
                    f"{step.new_micro_batch_size} sample(s). Noise and result stay the same. "
                    f"hardware.micro_batch={step.new_micro_batch_size} starts with this size."
                )
            if step.finite:
                self.state.skipped = 0
            else:
                self.state.skipped += 1
                self._handle_nonfinite_step(step, batches.sample_ids(step.number))
            yield step

    def _handle_nonfinite_step(self, step: Step, sample_ids: list[str]) -> None:
        """Records a step that was not finite. Raises errors.NonFiniteError if there are more than `skip_nonfinite`."""
        if self.recorder:
            self.recorder.log_nonfinite(step, sample_ids)
        others = f" and {len(sample_ids) - 16} more" if len(sample_ids) > 16 else ""
        text = (
            f"At step {step.number} the loss is {step.loss} and the gradient norm {step.grad_norm}; "
            f"nothing was updated. The samples of this step: {', '.join(sample_ids[:16])}{others}."
        )
        limit = self.run.skip_nonfinite
        if self.state.skipped > limit:
            raise NonFiniteError(
                f"{text} The usual remedy is a lower optimizer.lr. With skip_nonfinite={limit + 1} the same command "
                f"skips {'such a step' if limit == 0 else f'up to {limit + 1} of them in a row'} and continues."
            )
        self._warn(f"{text} It is skipped: skip_nonfinite={limit} allows up to {limit} in a row.")

    def _log(self, step: Step, speed: dict[str, float]) -> None:
        from trainer.hardware.devices import memory_metrics

        due = step.number % self.run.log.every == 0 or step.number == self.total_steps
        if self.recorder is None or not step.finite or not due:
            return
        values = {"train/loss": step.loss, "train/grad_norm": step.grad_norm, "train/lr": step.lr}
        if (effective_lr := self.run.optimizer.effective_lr(self.optimizer)) is not None:
            values["train/lr_effective"] = effective_lr
        if self.loss_scale is not None:
            values["train/loss_scale"] = self.loss_scale.value
        self.recorder.log_step(step.number, values | speed | memory_metrics(self.device))

    # Between steps

    def _evaluate_if_due(self, progress: Progress) -> bool:
        """Evaluates a step if it is due, and only once, even if the run is resumed at that step.

        Returns whether the held-out loss is the lowest so far.
        """
        due = self.step % self.evaluation_interval == 0 or self.step == self.total_steps
        if not due or self.state.evaluated == self.step:
            return False
        with progress.activity("evaluating"):
            measured = self.processes.run_on_all(
                lambda: self.evaluator.evaluate(self.step, self._main_recorder.folder, self._main_recorder.journal),
                lambda: self.evaluator.follow(),
            )
        is_best = self.state.record_evaluation(self.step, measured.get("val/loss"))
        if self.recorder:
            self.recorder.print_evaluation(self.step, measured, self.state)
        if self.step == self.saved_step > 0:
            # An earlier attempt stopped during this evaluation and saved this step without its loss.
            self.saved_step = -1
        set_train_mode(self.network)
        return is_best

    def _out_of_patience(self) -> bool:
        patience = self.run.evaluation.patience
        return patience is not None and self.state.since_best >= patience

    def _save_if_due(self, is_best: bool) -> None:
        is_last = self.step == self.total_steps or self._out_of_patience()
        if self.step % self.run.save.every == 0 or is_best or is_last:
            self._save(required=is_last)

    def _save(self, required: bool = True) -> None:
        """Saves the last finished step, unless it is saved already.

        If the disk is full and saving is not `required`, training continues.
        """
        if self.step == self.saved_step:
            return
        state = self.state.to_checkpoint(self.step, self.loss_scale)
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        tensors = self.processes.gather(
            {"weights": weights, "optimizer": self.optimizer.state_dict(), "average": self.average}
        )
        with self.signals.deferred():
            try:
                if self.recorder:
                    self.recorder.checkpoints.save(
                        self.step, tensors["weights"], tensors["optimizer"], tensors["average"], state
                    )
            except StorageError as error:
                # A sharded network cannot try again: gathering its shards is a collective call.
                if required or self.processes.sharded:
                    raise
                self._warn(f"{error} Training continues, and the next save tries again.")
                return
            self.saved_step = self.step
            if self.recorder:
                self.recorder.journal.log_event("checkpoint", step=self.step)

    def _finish(self) -> None:
        """Exports the weights and records that the run is finished. Called on the main process."""
        from trainer.export.write import export_after_training
        from trainer.hardware.devices import memory_metrics

        recorder = self._main_recorder
        exports: list[Path] = []
        export_error = None
        try:
            # Before the run counts as finished, so that the same command exports again if this process dies here.
            weights = load_best_weights(recorder.folder)[1]
            exports = export_after_training(self.run, self.network, weights, recorder.folder / "export")
        except (DataError, UsageError) as error:
            # For example, the adapter changes nothing. Training has finished in any case.
            export_error = error
        outcome = "done" if self.step == self.total_steps else "stopped early"
        # A signal must not interrupt the first import of matplotlib: the summary of a stopped attempt needs it, too.
        with self.signals.recorded():
            recorder.finish_run(outcome, self.step, self.state, memory_metrics(self.device), exports)
        if export_error:
            raise export_error
        if self.signals.seen:
            raise Interrupted(self.signals.seen)

    # The main process

    @property
    def _main_recorder(self) -> Recorder:
        """The recorder, in code that only the main process runs."""
        assert self.recorder is not None
        return self.recorder

    def _warn(self, text: str) -> None:
        if self.recorder:
            self.recorder.warn(text)
