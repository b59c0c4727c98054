"""Searches settings with Optuna. Each trial is a member of the sweep, or one member for each seed.

Optuna suggests the settings of a trial when a slot is free (its ask-and-tell interface), is told each held-out loss
while the trial trains, and decides which trials end early (pruning). The study is kept in a storage, by default a
SQLite file in the folder of the sweep: a search continues after any interruption, and several machines can share one.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.core.errors import StorageError, UsageError
from trainer.core.rng import seed_for
from trainer.sweep.members import Member, State, set_varied
from trainer.sweep.plan import Plan
from trainer.sweep.space import Choice, Dimension

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("tpe", "random", "grid", "qmc", "cmaes")
PRUNERS = ("none", "median", "successive_halving", "hyperband")
OBJECTIVES: dict[str, tuple[Literal["minimize", "maximize"], Callable[[Member], float | None]]] = {
    "loss": ("minimize", lambda member: member.best_loss),
    "minutes": ("minimize", lambda member: member.minutes),
    "memory": ("minimize", lambda member: member.memory),
    "psnr": ("maximize", lambda member: member.psnr),
}
"""What a search can optimize: the direction, and the value of a member that has finished."""
MIN_TRIALS_FOR_IMPORTANCE = 8
"""With fewer trials, importances are noise."""
OWNER = "sweep"
"""Attribute of a trial: the `folder_id` of the sweep that runs its members."""


@dataclass(slots=True)
class SearchSettings:
    """Settings of a search; see `conf/hydra/sweeper/optuna.yaml`. Raises errors.UsageError."""

    n_trials: int = 20
    sampler: str = "tpe"
    pruner: str = "none"
    startup_trials: int = 5
    min_steps: int = 0
    objectives: list[str] = field(default_factory=lambda: ["loss"])
    storage: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in {"sampler": SAMPLERS, "pruner": PRUNERS}.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"hydra.sweeper.{name}={getattr(self, name)} does not exist; type one of {', '.join(allowed)}"
                )
        for name, lowest in {"n_trials": 1, "startup_trials": 0, "min_steps": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise UsageError(f"hydra.sweeper.{name}={value} must be a whole number, at least {lowest}")
        if not self.objectives or set(self.objectives) - set(OBJECTIVES):
            raise UsageError(
                f"hydra.sweeper.objectives=[{','.join(map(str, self.objectives))}]: type some of "
                f"{', '.join(OBJECTIVES)}, such as hydra.sweeper.objectives=[loss,minutes]"
            )
        if self.pruner != "none" and self.objectives != ["loss"]:
            raise UsageError(
                f"hydra.sweeper.pruner={self.pruner} compares held-out losses only; type "
                "hydra.sweeper.objectives=[loss], or hydra.sweeper.pruner=none"
            )


class Search(Plan):
    """Members whose settings Optuna suggests.

    Args:
        settings: How to search.
        space: The settings to search.
        fixed: Overrides that all members share.
        seeds: Seeds with which each trial is trained; its value is the mean. Empty if the members do not set a seed.
        folder: Folder of the sweep, whose name is the name of the study.
    """

    def __init__(
        self,
        settings: SearchSettings,
        space: Sequence[Dimension],
        fixed: Sequence[str],
        seeds: Sequence[str],
        folder: Path,
    ):
        self.settings, self.space, self.fixed, self.folder = settings, list(space), list(fixed), folder
        self.seeds: list[str | None] = [*seeds] or [None]
        self._study: optuna.Study
        self._owner = ""
        self._queue: deque[tuple[int, str | None]] = deque()
        """Trials and seeds that are to run next."""

    @property
    def description(self) -> str:
        each = f" with {len(self.seeds)} seeds each" if len(self.seeds) > 1 else ""
        return f"{self.settings.n_trials} trials{each} ({self.settings.sampler}, pruner {self.settings.pruner})"

    @property
    def total(self) -> int:
        return self.settings.n_trials * len(self.seeds)

    @property
    def searched(self) -> list[str]:
        return [str(dimension) for dimension in self.space]

    @property
    def is_exhausted(self) -> bool:
        with _storage_errors(self._url):
            return not self._queue and len(self._study.get_trials(deepcopy=False)) >= self.settings.n_trials

    def start(self, recorded: Sequence[Member], folder_id: str) -> list[Member]:
        self._owner = folder_id
        members = list(recorded)
        with _storage_errors(self._url):
            self._study = self._open_study()
            for trial in self._study.get_trials(deepcopy=False):
                if self._is_own(trial):
                    self._continue(trial, members)
        return members

    def next_member(self, members: Sequence[Member]) -> Member | None:
        if not self._queue:
            if self.is_exhausted:
                return None
            with _storage_errors(self._url):
                trial = self._study.ask({dimension.key: dimension.distribution() for dimension in self.space})
                trial.set_user_attr(OWNER, self._owner)
            self._queue.append((trial.number, self.seeds[0]))
            if self.settings.pruner == "none":
                self._queue += [(trial.number, seed) for seed in self.seeds[1:]]
        number, seed = self._queue.popleft()
        return self._member(len(members) + 1, self._trial(number), seed)

    def set_varied(self, members: Sequence[Member]) -> None:
        keys = [*(dimension.key for dimension in self.space), *(["seed"] if len(self.seeds) > 1 else [])]
        set_varied(members, keys)

    def is_over(self, member: Member) -> bool:
        # A trial whose loss is not finite, for example, is a result. One that a signal has killed is continued.
        has_failed = member.status == State.FAILED and (member.code or 0) > 0
        return member.status in (State.FINISHED, State.PRUNED) or has_failed

    def should_prune(self, member: Member, step: int, loss: float) -> bool:
        if self.settings.pruner == "none" or self._seed_of(member) != self.seeds[0]:
            return False
        import optuna

        with _storage_errors(self._url):
            trial = optuna.trial.Trial(self._study, self._trial(member.trial)._trial_id)
            trial.report(loss, step)
            return trial.should_prune()

    def record_end(self, member: Member, members: Sequence[Member]) -> None:
        with _storage_errors(self._url):
            self._record(self._trial(member.trial), [other for other in members if other.trial == member.trial])

    def remarks(self, members: Sequence[Member]) -> list[str]:
        """Says which settings matter (functional ANOVA, Hutter et al. 2014), and which trials no other one beats."""
        import optuna
        from optuna.trial import TrialState

        with _storage_errors(self._url):
            complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if len(self.settings.objectives) > 1:
                numbers = {trial.number for trial in self._study.best_trials}
                front = [member for member in members if member.trial in numbers]
                names = " and ".join(self.settings.objectives)
                return [
                    f"No other trial beats these in both {names}: {'; '.join(dict.fromkeys(m.title for m in front))}"
                ]
            if len(self.space) < 2 or len(complete) < MIN_TRIALS_FOR_IMPORTANCE:
                return []
            shares = optuna.importance.get_param_importances(
                self._study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
            )
        text = ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
        return [f"Share of the differences in loss that a setting explains: {text}."]

    # Trials

    def _continue(self, trial: optuna.trial.FrozenTrial, members: list[Member]) -> None:
        """Adds what is left to run of a trial of this sweep, whose members may be in the record or not."""
        own = [member for member in members if member.trial == trial.number]
        if not own:
            own = [self._member(len(members) + 1, trial, self.seeds[0])]
            members += own
        if not trial.state.is_finished():
            for member in own:
                if member.status != State.FINISHED:
                    member.status = State.WAITING
            self._record(trial, own)

    def _record(self, trial: optuna.trial.FrozenTrial, members: Sequence[Member]) -> None:
        """Tells the study how a trial has ended, if it has, or adds the members for its further seeds."""
        from optuna.trial import TrialState

        if trial.state.is_finished():
            return
        states = {member.status for member in members}
        ended = {member.status for member in members if self.is_over(member)}
        if State.PRUNED in ended or State.FAILED in ended:
            self._queue = deque(entry for entry in self._queue if entry[0] != trial.number)
            self._study.tell(trial.number, state=TrialState.FAIL if State.FAILED in ended else TrialState.PRUNED)
        elif states == {State.FINISHED}:
            started = {self._seed_of(member) for member in members} | {
                seed for number, seed in self._queue if number == trial.number
            }
            missing = [seed for seed in self.seeds if seed not in started]
            self._queue += [(trial.number, seed) for seed in missing]
            if not missing and len(members) == len(self.seeds):
                self._tell_values(trial, members)

    def _tell_values(self, trial: optuna.trial.FrozenTrial, members: Sequence[Member]) -> None:
        from optuna.trial import TrialState

        values = []
        for name in self.settings.objectives:
            found = [OBJECTIVES[name][1](member) for member in members]
            numbers = [value for value in found if value is not None and math.isfinite(value)]
            if len(numbers) < len(found):
                self._study.tell(trial.number, state=TrialState.FAIL)
                return
            values.append(statistics.fmean(numbers))
        self._study.tell(trial.number, values)

    def _member(self, number: int, trial: optuna.trial.FrozenTrial, seed: str | None) -> Member:
        chosen = [f"{key}={value}" for key, value in trial.params.items()]
        return Member(number, [*self.fixed, *chosen, *([] if seed is None else [f"seed={seed}"])], trial=trial.number)

    def _seed_of(self, member: Member) -> str | None:
        return None if self.seeds == [None] else member.settings.get("seed")

    def _trial(self, number: int | None) -> optuna.trial.FrozenTrial:
        assert number is not None
        return self._study.get_trials(deepcopy=False)[number]

    def _is_own(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Returns whether this sweep runs the trial. A trial without an owner is one whose sweep was killed."""
        owner = trial.user_attrs.get(OWNER)
        return owner == self._owner or (owner is None and self.settings.storage is None)

    # The study

    @property
    def _url(self) -> str:
        return self.settings.storage or f"sqlite:///{self.folder / 'study.db'}"

    def _open_study(self) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            storage=self._url,
            study_name=self.folder.name,
            load_if_exists=True,
            directions=[OBJECTIVES[name][0] for name in self.settings.objectives],
            pruner=self._pruner(),
        )
        # A continued search must not repeat the random numbers of its first trials.
        study.sampler = self._sampler(seed_for(self.settings.seed, len(study.get_trials(deepcopy=False))) % 2**32)
        return study

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        from optuna import samplers

        startup = self.settings.startup_trials
        if self.settings.sampler == "tpe":
            # The liar keeps members that run at the same time from trying the same settings.
            return samplers.TPESampler(n_startup_trials=startup, multivariate=True, constant_liar=True, seed=seed)
        if self.settings.sampler == "random":
            return samplers.RandomSampler(seed)
        if self.settings.sampler == "cmaes":
            return samplers.CmaEsSampler(n_startup_trials=startup, seed=seed)
        # These two keep their position in the storage, and must have the same seed in each attempt.
        if self.settings.sampler == "qmc":
            return samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=self.settings.seed)
        return samplers.GridSampler(self._grid(), self.settings.seed)

    def _grid(self) -> dict[str, Sequence[Any]]:
        grid: dict[str, Sequence[Any]] = {}
        for dimension in self.space:
            if not isinstance(dimension, Choice):
                raise UsageError(
                    f"hydra.sweeper.sampler=grid needs a list of values, but {dimension} is an interval; type "
                    f"{dimension.key}=VALUE,VALUE, or hydra.sweeper.sampler=tpe"
                )
            grid[dimension.key] = dimension.values
        return grid

    def _pruner(self) -> optuna.pruners.BasePruner:
        from optuna import pruners

        start = self.settings.min_steps
        if self.settings.pruner == "median":
            return pruners.MedianPruner(n_startup_trials=self.settings.startup_trials, n_warmup_steps=start)
        if self.settings.pruner == "successive_halving":
            return pruners.SuccessiveHalvingPruner(min_resource=start or "auto")
        if self.settings.pruner == "hyperband":
            return pruners.HyperbandPruner(min_resource=start or 1)
        return pruners.NopPruner()


@contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    """Converts errors of Optuna's storage to errors.StorageError."""
    import optuna
    import sqlalchemy

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise StorageError(
            f"The search cannot use its storage {url} ({reason}). Type hydra.sweeper.storage=sqlite:///FILE on a disk "
            "that can be written, or the same command again when the database answers."
        ) from error
