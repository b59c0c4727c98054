"""Searches with Optuna: trials, pruning, seeds, continuing, and sharing a study."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.core.errors import StorageError, UsageError
from trainer.sweep.members import Member, State, set_varied
from trainer.sweep.plan import waiting
from trainer.sweep.replicates import describe_winner, difference_interval, group_by_settings, means_table
from trainer.sweep.search import Search, SearchSettings
from trainer.sweep.space import Choice, Range

ROOT = Path(__file__).resolve().parents[1]
SPACE = (Range("optimizer.lr", 1e-5, 1e-1, log=True), Choice("method.rank", ("4", "16")))
STEPS = (10, 20, 30)


def loss_of(member: Member) -> float:
    """A loss with its minimum at a rate of 1e-3 and rank 16."""
    settings = member.settings
    distance = abs(math.log10(float(settings["optimizer.lr"])) + 3)
    return 0.1 + distance + 0.3 * (settings["method.rank"] == "4") + 0.01 * int(settings.get("seed", 0))


class Sweeper:
    """Runs the members of a search in turn, with `loss_of` in place of training."""

    def __init__(self, folder: Path, *, owner: str = "here", seeds: tuple[str, ...] = (), **settings: object):
        self.search = Search(SearchSettings(**settings), SPACE, ["steps=30"], seeds, folder)
        self.owner, self.members = owner, list[Member]()

    def run(self, most: int = 1000, train: Callable[[Member], None] | None = None) -> list[Member]:
        self.members = self.search.start(self.members, self.owner)
        queue = waiting(self.members)
        for _ in range(most):
            if queue:
                member = queue.pop(0)
            elif (member := self.search.next_member(self.members)) is not None:
                self.members.append(member)
            else:
                break
            (train or self.train)(member)
            self.search.record_end(member, self.members)
        self.search.set_varied(self.members)
        return self.members

    def train(self, member: Member) -> None:
        loss = loss_of(member)
        for step in STEPS:
            if self.search.should_prune(member, step, loss + 1 / step):
                member.status, member.code, member.reason = State.PRUNED, 143, f"at step {step}"
                return
        member.status, member.code, member.best_loss, member.minutes = State.FINISHED, 0, loss, 1.0


def fail(member: Member) -> None:
    member.status, member.code = State.FAILED, 70


def kill(member: Member) -> None:
    member.status, member.code = State.FAILED, -9


def test_a_search_finds_better_settings_than_random_ones_and_is_repeatable(tmp_path: Path):
    def best(name: str, sampler: str) -> float:
        return min(loss_of(member) for member in Sweeper(tmp_path / name, n_trials=30, sampler=sampler).run())

    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    assert best("a", "tpe") < best("b", "random")
    assert best("c", "tpe") == min(loss_of(member) for member in Sweeper(tmp_path / "a", n_trials=30).run())


@pytest.mark.parametrize("sampler", ["random", "qmc", "cmaes"])
def test_a_continued_search_tries_new_settings(sampler: str, tmp_path: Path):
    Sweeper(tmp_path, n_trials=4, sampler=sampler).run()
    members = Sweeper(tmp_path, n_trials=8, sampler=sampler).run()
    assert len({member.settings["optimizer.lr"] for member in members}) == 8
    assert [member.number for member in members] == list(range(1, 9))
    assert {member.settings["steps"] for member in members} == {"30"}


def test_pruning_ends_trials_that_fall_behind(tmp_path: Path):
    sweeper = Sweeper(tmp_path, n_trials=20, pruner="median", startup_trials=3)
    members = sweeper.run()
    pruned = [member for member in members if member.status == State.PRUNED]
    finished = [loss_of(member) for member in members if member.status == State.FINISHED]
    assert len(members) == 20 and len(pruned) > 3
    assert statistics.fmean(finished) < statistics.fmean(loss_of(member) for member in pruned)
    states = [trial.state.name for trial in sweeper.search._study.trials]
    assert states.count("PRUNED") == len(pruned) and states.count("COMPLETE") == len(finished)


@pytest.mark.parametrize(("end", "again"), [(kill, True), (fail, False)])
def test_a_killed_trial_is_trained_again_and_a_failed_one_is_not(end: Callable, again: bool, tmp_path: Path):
    first = Sweeper(tmp_path, n_trials=3)
    (member,) = first.run(1, end)
    second = Sweeper(tmp_path, n_trials=3)
    second.members = first.members
    members = second.run()
    assert len(members) == 3 and members[0].overrides == member.overrides
    assert members[0].status == (State.FINISHED if again else State.FAILED)


def test_a_trial_that_no_record_mentions_is_trained(tmp_path: Path):
    """The sweep was killed between Optuna's suggestion and its own record of the member."""
    first = Sweeper(tmp_path, n_trials=2)
    first.members = first.search.start([], "here")
    member = first.search.next_member([])
    members = Sweeper(tmp_path, n_trials=2).run()
    assert members[0].overrides == member.overrides and [m.status for m in members] == [State.FINISHED] * 2


def test_two_sweeps_share_a_study(tmp_path: Path):
    (tmp_path / "sweep").mkdir()
    settings = {"n_trials": 6, "storage": f"sqlite:///{tmp_path / 'shared.db'}"}
    here = Sweeper(tmp_path / "sweep", owner="here", **settings)
    there = Sweeper(tmp_path / "sweep", owner="there", **settings)
    here.run(2)
    assert len(there.run(3)) == 3
    assert len(here.run()) == 3
    assert len({member.settings["optimizer.lr"] for member in here.members + there.members}) == 6


def test_each_trial_trains_with_every_seed_and_counts_by_the_mean(tmp_path: Path):
    sweeper = Sweeper(tmp_path, n_trials=4, seeds=("0", "1", "2"))
    members = sweeper.run()
    assert len(members) == 12
    for trial in sweeper.search._study.trials:
        own = [loss_of(member) for member in members if member.trial == trial.number]
        assert trial.value == pytest.approx(statistics.fmean(own))
    (first, *_), table = group_by_settings(members), means_table(members)
    assert len(first.losses) == 3 and f"{first.mean:.4f}" in table and len(table.splitlines()) == 6
    # The losses differ by the same number for each seed, so the difference is certain.
    assert "is better than" in describe_winner(members)


def test_a_pruned_trial_starts_no_further_seeds(tmp_path: Path):
    members = Sweeper(tmp_path, n_trials=12, seeds=("0", "1"), pruner="median", startup_trials=2).run()
    pruned = {member.trial for member in members if member.status == State.PRUNED}
    assert pruned and all(sum(member.trial == trial for member in members) == 1 for trial in pruned)
    assert all(sum(member.trial == trial for member in members) == 2 for trial in set(range(12)) - pruned)


def test_several_objectives_have_a_front(tmp_path: Path):
    sweeper = Sweeper(tmp_path, n_trials=6, objectives=["loss", "minutes"])
    members = sweeper.run()
    (remark,) = sweeper.search.remarks(members)
    best = min(members, key=loss_of)
    assert remark.startswith("No other trial beats these in both loss and minutes") and best.title in remark


def test_the_difference_of_two_settings_is_paired_by_seed():
    from scipy import stats

    a, b = [0.50, 0.61, 0.42, 0.55], [0.52, 0.66, 0.43, 0.60]
    members = [
        Member(i, [f"method.rank={rank}", f"seed={seed}"], status=State.FINISHED, best_loss=loss)
        for rank, losses in ((4, a), (8, b))
        for i, (seed, loss) in enumerate(enumerate(losses))
    ]
    set_varied(members)
    first, second = group_by_settings(members)
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert difference_interval(first, second) == pytest.approx((expected.low, expected.high))
    assert "is not distinguishable from" in describe_winner(members)
    assert "One seed does not show" in describe_winner([m for m in members if m.settings["seed"] == "0"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampler": "best"}, "hydra.sweeper.sampler=best does not exist; type one of tpe"),
        ({"n_trials": 0}, "hydra.sweeper.n_trials=0 must be a whole number, at least 1"),
        ({"objectives": ["accuracy"]}, "type some of loss, minutes"),
        ({"objectives": ["loss", "psnr"], "pruner": "median"}, "compares held-out losses only"),
        ({"sampler": "grid"}, "hydra.sweeper.sampler=grid needs a list of values"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, words: str, tmp_path: Path):
    with pytest.raises(UsageError, match=words.replace("[", r"\[")):
        Sweeper(tmp_path, **settings).run()


@pytest.mark.parametrize(("low", "high", "log"), [(1e-2, 1e-5, False), (0.0, 1.0, True)])
def test_impossible_intervals_are_refused(low: float, high: float, log: bool):
    with pytest.raises(UsageError, match="optimizer.lr"):
        Range("optimizer.lr", low, high, log=log)


def test_a_storage_that_cannot_be_used_is_told(tmp_path: Path):
    with pytest.raises(StorageError, match="The search cannot use its storage"):
        Sweeper(tmp_path, storage=f"sqlite:///{tmp_path / 'no folder' / 'study.db'}").run()


# With processes


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer", "-m", "hydra/sweeper=optuna", f"out={out}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["method.rank=4"], "This search has no settings to vary"),
        (["method.rank=2,4", "hydra/launcher=basic"], "type hydra/launcher=processes"),
    ],
)
def test_a_search_that_cannot_run_is_refused(arguments: list[str], words: str, tmp_path: Path):
    text, _ = (process := start(tmp_path, *arguments)).communicate(timeout=240)
    assert process.returncode == 64 and words in text, text


@pytest.mark.slow
def test_a_killed_search_continues_prunes_and_shows_it_in_mlflow(tmp_path: Path):
    from trainer.tracking.mlflow_store import connect

    search = [
        "optimizer.lr=tag(log,interval(1e-7,1e-2))",
        "method.rank=choice(2,4)",
        "hydra.sweeper.n_trials=6",
        "hydra.sweeper.pruner=median",
        "hydra.sweeper.startup_trials=1",
        *("steps=12", "evaluation.every=3", "evaluation.images=0", "dataset.pairs=8", "dataset.held_out=2"),
    ]
    process = start(tmp_path, *search)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("sweeps/*/2.log")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    text, _ = (process := start(tmp_path, *search)).communicate(timeout=600)
    assert process.returncode == 0 and "The command of the best member" in text, text
    (record,) = tmp_path.glob("sweeps/*/sweep.json")
    members = json.loads(record.read_text())["members"]
    assert len(members) == 6 and {member["status"] for member in members} == {"finished", "pruned"}, text
    assert "1/6" not in text, "the first member had finished"
    client, experiment = connect(f"sqlite:///{tmp_path / 'mlflow.db'}", "trainer")
    pruned = [run for run in client.search_runs([experiment]) if "pruned" in run.data.tags]
    assert len(pruned) == sum(member["status"] == "pruned" for member in members)
    text, _ = (process := start(tmp_path, *search)).communicate(timeout=240)
    assert process.returncode == 0 and "is finished (6 members)" in text, text
    # A pruned member is continued to its end by its own command.
    member = next(member for member in members if member["status"] == "pruned")
    command = [sys.executable, "-m", "trainer", *member["overrides"]]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "continuing at step" in done.stdout and "done at step 12" in done.stdout
