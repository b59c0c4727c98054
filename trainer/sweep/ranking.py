"""Ranks the members of a sweep by held-out loss, and formats the ranking as tables."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from trainer.sweep.members import Member, State, short_value, varied_values

SEED = "seed"
CSV_FIELDS = ("best_loss", "last_loss", "psnr", "minutes", "status", "code", "reason", "folder", "log", "memory")


class HeatMap(NamedTuple):
    """Best held-out loss over the values of two settings."""

    x: tuple[str, list[float]]
    """Name and values of the setting that varies across columns."""
    y: tuple[str, list[float]]
    """Name and values of the setting that varies across rows."""
    losses: list[list[float]]
    """Losses by row and column; NaN where there is none."""


def is_finite(value: Any) -> TypeGuard[float]:
    """Returns whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def rank(members: Sequence[Member]) -> list[Member]:
    """Returns the members that finished with a held-out loss, best first."""
    losses = [
        (member.best_loss, member.number, member)
        for member in members
        if member.status == State.FINISHED and is_finite(member.best_loss)
    ]
    return [member for _, _, member in sorted(losses, key=lambda entry: entry[:2])]


def unranked(members: Sequence[Member]) -> list[Member]:
    """Returns the members that have no rank."""
    ranked = rank(members)
    return [member for member in members if member not in ranked]


def markdown_table(members: Sequence[Member]) -> str:
    """Returns a table of the ranked members and then the others, and below it the reasons why members failed."""
    keys = list(varied_values(members))
    # Not "rank", the name of a setting that sweeps often vary.
    rows = [["place", "member", *keys, "val/loss best", "last", "val/psnr", "minutes", "status", "folder"]]
    rows.append(["---"] * len(rows[0]))
    for place, member in enumerate(rank(members), 1):
        rows.append([f"{place}", f"{member.number}", *_cells(member, keys), member.status, f"`{member.folder}`"])
    others = unranked(members)
    for member in others:
        folder = f"`{member.folder}`" if member.folder else ""
        rows.append(["", f"{member.number}", *_cells(member, keys), member.ending, folder])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    reasons = "\n".join(
        f"- member {member.number}, {member.title}: {member.reason} (log `{member.log}`)"
        for member in others
        if member.reason and member.status != State.PRUNED
    )
    return f"{table}\n\n{reasons}\n" if reasons else f"{table}\n"


def csv_table(members: Sequence[Member]) -> str:
    """Returns the ranking as CSV, with all digits."""
    keys, ranked = list(varied_values(members)), rank(members)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["place", "member", *keys, *CSV_FIELDS])
    places = [*range(1, len(ranked) + 1), *[""] * (len(members) - len(ranked))]
    for place, member in zip(places, [*ranked, *unranked(members)], strict=True):
        values = [member.varied.get(key, "") for key in keys]
        table.writerow([place, member.number, *values, *(getattr(member, name) for name in CSV_FIELDS)])
    return text.getvalue()


def align(table: str) -> str:
    """Formats a Markdown table for the terminal, with columns padded to equal width. Keeps list items below it."""
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [line for line in table.splitlines() if line.startswith("- ")])


def heat_map(members: Sequence[Member]) -> HeatMap | None:
    """Returns the losses over two varied settings, means over the seeds.

    None unless exactly two settings vary besides the seed, both are numbers, and most of their combinations were tried.
    """
    varied = {key: values for key, values in varied_values(members).items() if key != SEED}
    try:
        axes = {key: sorted({float(value) for value in values}) for key, values in varied.items()}
    except ValueError:
        return None
    if len(axes) != 2:
        return None
    (y, rows), (x, columns) = axes.items()
    cells: dict[tuple[float, float], list[float]] = {}
    for member in rank(members):
        assert member.best_loss is not None
        cells.setdefault((float(member.varied[y]), float(member.varied[x])), []).append(member.best_loss)
    tried = {(float(member.varied[y]), float(member.varied[x])) for member in members}
    if 2 * len(tried) <= len(rows) * len(columns):
        return None
    losses = [[statistics.fmean(cells.get((row, column), [math.nan])) for column in columns] for row in rows]
    return HeatMap((x, columns), (y, rows), losses)


def edge_advice(members: Sequence[Member]) -> str | None:
    """Returns how to widen the grid if the best member has the lowest or highest tried value of a numeric setting.

    None if it lies inside the grid, or if no member has a rank.
    """
    ranked = rank(members)
    if not ranked:
        return None
    edges, wider = [], []
    for key, texts in varied_values(members).items():
        best = ranked[0].varied.get(key)
        if best is None or key.rpartition(".")[2] == "seed":
            continue  # a seed is no quantity
        try:
            values = sorted({float(text) for text in texts})
        except ValueError:
            continue
        at_top = float(best) == values[-1]
        if len(values) < 2 or not (at_top or float(best) == values[0]):
            continue
        # As far beyond the edge as the value before it is inside.
        value, inner = (values[-1], values[-2]) if at_top else (values[0], values[1])
        beyond = value * value / inner if values[0] > 0 else 2 * value - inner
        is_whole = all(re.fullmatch(r"[+-]?\d+", text) for text in texts)
        text = f"{round(beyond)}" if is_whole else f"{beyond:.3g}"
        if float(text) == value or float(text) <= 0 < value or float(text) < 0 <= values[0]:
            continue  # there is no such value, for example below rank 1
        edges.append(f"{key}={best} is the {'highest' if at_top else 'lowest'} tried")
        wider.append(f"{key}={','.join([best, text] if at_top else [text, best])}")
    if not edges:
        return None
    return (
        f"The best member lies at the edge of the grid: {' and '.join(edges)}. To widen it, type the same command with "
        f"-m {' '.join(wider)}"
    )


def _cells(member: Member, keys: Sequence[str]) -> list[str]:
    numbers = (member.best_loss, ".4f"), (member.last_loss, ".4f"), (member.psnr, ".2f"), (member.minutes, ".1f")
    return [short_value(member.varied.get(key, "")) for key in keys] + [
        format(value, form) if is_finite(value) else "" for value, form in numbers
    ]
