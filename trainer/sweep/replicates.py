"""Members that differ in nothing but the seed: their mean loss, and whether two means differ by more than chance."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from trainer.sweep.members import Member, short_value
from trainer.sweep.ranking import SEED, rank

CONFIDENCE = 0.95


class Replicates(NamedTuple):
    """Members that have finished with a held-out loss, and that differ only in the seed."""

    settings: dict[str, str]
    """Their values of the other settings that vary in the sweep."""
    losses: dict[str, float]
    """Seed -> best held-out loss."""

    @property
    def title(self) -> str:
        return " ".join(f"{key}={short_value(value)}" for key, value in self.settings.items()) or "defaults"

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses.values())

    @property
    def std(self) -> float:
        """Standard deviation of the sample; 0 of a single loss."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else 0.0


def group_by_settings(members: Sequence[Member]) -> list[Replicates]:
    """Returns the replicates of a sweep, lowest mean loss first."""
    groups: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for member in rank(members):
        assert member.best_loss is not None
        settings = tuple((key, value) for key, value in member.varied.items() if key != SEED)
        groups.setdefault(settings, {})[member.varied.get(SEED, "")] = member.best_loss
    found = [Replicates(dict(settings), losses) for settings, losses in groups.items()]
    return sorted(found, key=lambda replicates: replicates.mean)


def difference_interval(first: Replicates, second: Replicates) -> tuple[float, float] | None:
    """Returns the interval that holds the mean difference `second` - `first` with 95 % confidence.

    The losses are paired by seed (Student's t). None with fewer than two common seeds.
    """
    from scipy.stats import t

    differences = [second.losses[seed] - loss for seed, loss in first.losses.items() if seed in second.losses]
    count = len(differences)
    if count < 2:
        return None
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(differences) / count**0.5
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def means_table(members: Sequence[Member]) -> str:
    """Returns a Markdown table of the mean losses over the seeds; empty if no settings were trained with several."""
    groups = group_by_settings(members)
    if not any(len(group.losses) > 1 for group in groups):
        return ""
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    rows = [["place", *keys, "mean val/loss", "std", "seeds"], ["---"] * (len(keys) + 4)]
    for place, group in enumerate(groups, 1):
        values = [short_value(group.settings.get(key, "")) for key in keys]
        rows.append([f"{place}", *values, f"{group.mean:.4f}", f"{group.std:.4f}", f"{len(group.losses)}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def describe_winner(members: Sequence[Member]) -> str | None:
    """Returns whether the best settings are better than the next by more than chance; None if there are no two."""
    groups = group_by_settings(members)
    if len(groups) < 2:
        return None
    best, following = groups[:2]
    interval = difference_interval(best, following)
    if interval is None:
        return (
            f"The best, {best.title}, leads {following.title} by {following.mean - best.mean:.4f}. One seed does not "
            "show whether that is more than chance; seed=0,1,2 does."
        )
    low, high = interval
    verdict = "is better than" if low > 0 else "is not distinguishable from"
    return (
        f"The best, {best.title}, {verdict} {following.title}: its loss is lower by "
        f"{following.mean - best.mean:.4f} (95 % interval {low:.4f} to {high:.4f}, {len(best.losses)} seeds)."
    )
