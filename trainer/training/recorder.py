"""Records an attempt at a run: journal, checkpoints, summary, and lines on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.schema import Run
from trainer.core.console import print_line
from trainer.core.errors import Interrupted
from trainer.tracking import curves
from trainer.tracking.journal import Journal
from trainer.tracking.tracker import Tracker
from trainer.training.alerts import Alert, Alerts
from trainer.training.build import describe_precision
from trainer.training.checkpoint import CHECKPOINTS, Checkpoints
from trainer.training.run_folder import RunFolder
from trainer.training.state import TrainingState

if TYPE_CHECKING:
    from trainer.training.checkpoint_format import Checkpoint
    from trainer.training.loop import Step


class Recorder:
    """What the main process of a run writes; its followers have no recorder.

    `open_tracker` returns the tracker that follows the journal. It is called when the journal has an attempt.
    """

    def __init__(self, run: Run, run_folder: RunFolder, journal: Journal, open_tracker: Callable[[], Tracker]):
        self.run, self.run_folder, self.journal, self.open_tracker = run, run_folder, journal, open_tracker
        self.folder = run_folder.path
        self.finished = False
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, run.save.keep, self.warn)

    def warn(self, text: str, **fields: Any) -> None:
        self.journal.log_event("warning", text=text, **fields)
        print_line(text)

    def give(self, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            self.warn(alert.text, alert=alert.kind)

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Records what was measured at a step."""
        self.journal.log_metrics(step, values)
        self.give(self.alerts.after_step(step, values))

    def newest_checkpoint(self) -> tuple[Path, Checkpoint | None]:
        """Returns the newest undamaged checkpoint of the run, else of its parent, and the folder that contains it."""
        self.checkpoints.clean()
        checkpoint = self.checkpoints.newest()
        if checkpoint is not None or self.run_folder.parent is None:
            return self.checkpoints.folder, checkpoint
        parent = Checkpoints(self.run_folder.parent / CHECKPOINTS, self.run.save.keep, self.warn)
        return parent.folder, parent.newest(set_aside=False)

    def start_attempt(
        self, step: int, counts: str, location: str, environment: dict[str, Any], total_steps: int, memory_gib: float
    ) -> None:
        """Records that an attempt starts after `step`. `counts` and `location` describe it in words."""
        self.alerts = Alerts(self.run, total_steps, memory_gib, self.journal.records())
        print_line(f"{self.folder}: {counts}, {location}")
        print_line(f"precision: {describe_precision(self.run)}")
        for warning in self.run.model.warnings():
            self.warn(warning)
        number = 1 + self.journal.counts["attempt"]
        self.journal.log_event("attempt", number=number, start=step, counts=counts, machine=environment)

    def print_evaluation(self, step: int, measured: dict[str, float], state: TrainingState) -> None:
        """Prints what an evaluation measured, or where its images are if it measured nothing."""
        texts = _describe_losses(state)
        if "val/psnr" in measured:
            texts.append(f"psnr {measured['val/psnr']:.2f}")
        if not texts:
            texts = [f"no sample is held out, images {self.folder / 'pictures'}"]
        print_line(f"step {step}: {', '.join(texts)}")
        self.give(self.alerts.after_evaluation(step, state.val_loss, state.best))

    def log_nonfinite(self, step: Step, sample_ids: list[str]) -> None:
        values = {"loss": step.loss, "grad_norm": step.grad_norm}
        self.journal.log_event("not_finite", step=step.number, samples=sample_ids, **values)

    def stop_attempt(self, stop: Interrupted, step: int, total_steps: int, state: TrainingState) -> None:
        """Records that a signal has ended the attempt after `step`, which is saved, and says so in `stop`."""
        if self.finished:
            stop.add_outcome("the run is finished.")
            return
        self._write_summary("stopped", str(stop), step, state)
        # Not printed here: whoever handles `stop` shows its message.
        stop.add_outcome(f"saved at step {step} of {total_steps}. The same command continues from there.")

    def finish_run(
        self, outcome: str, step: int, state: TrainingState, memory: dict[str, float], exports: list[Path]
    ) -> None:
        """Records that the run is finished. `outcome` is "done" or "stopped early"; `memory` as in `memory_metrics`."""
        self.journal.log_event("finished", step=step, how=outcome)
        self._write_summary("finished", outcome, step, state)
        self.finished = True
        losses = ", ".join(_describe_losses(state))
        print_line(f"{outcome} at step {step}{losses and f': {losses}'}")
        names = {name: name.removeprefix("system/").removesuffix("_gib").replace("_", " ") for name in memory}
        print_line(", ".join(f"{names[name]} {value:.2f} GiB" for name, value in memory.items()))
        print_line(f"images {self.folder / 'pictures'}, curves {self.folder / 'training_curves.png'}")
        for path in exports:
            print_line(f"exported {path}")

    def _write_summary(self, status: str, how: str, step: int, state: TrainingState) -> None:
        """Writes metrics.csv, training_curves.png and summary.json."""
        curves.write_metrics_csv(self.folder)
        curves.draw_curves(self.folder)
        losses = {"best_val_loss": state.best, "last_val_loss": state.val_loss}
        summary = {"status": status, "how": how, "id": self.run_folder.id, "steps": step, **losses}
        curves.write_summary(self.folder, summary)


def _describe_losses(state: TrainingState) -> list[str]:
    """Returns the held-out losses in words; nothing if no samples are held out."""
    values = {"held-out loss": state.val_loss, "best": state.best}
    return [f"{name} {value:.4f}" for name, value in values.items() if value is not None]
