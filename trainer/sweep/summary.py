"""The results of a sweep: tables and images in its folder, on the terminal and in the tracker."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from trainer.core import files
from trainer.core.console import print_line
from trainer.sweep import pictures
from trainer.sweep.members import Member, State, varied_values
from trainer.sweep.plan import Plan
from trainer.sweep.ranking import align, csv_table, is_finite, markdown_table, rank, unranked
from trainer.sweep.replicates import describe_winner, means_table
from trainer.tracking import Tracking
from trainer.tracking.journal import Journal
from trainer.tracking.tracker import Tracker


def summarize(
    folder: Path,
    members: Sequence[Member],
    plan: Plan,
    tracking: Tracking,
    out: Path,
    tracker: Tracker,
    journal: Journal,
) -> bool:
    """Writes the ranking and images to the sweep's `folder`, prints the ranking and sends both to the tracker.

    Returns whether the tracker has them.
    """
    pictures.draw_heat_map(folder, members)
    pictures.draw_samples(folder, members)
    ranked = rank(members)
    if ranked:
        # The run of the sweep shows the best results, next to runs that belong to no sweep.
        results = {"val/loss": ranked[0].best_loss, "val/psnr": ranked[0].psnr}
        journal.log_metrics(len(ranked), {name: value for name, value in results.items() if is_finite(value)})
    files.write(folder / "ranking.csv", csv_table(members))
    links, table = tracking.sweep_links(folder, _run_folders(members)), markdown_table(members)
    files.write(
        folder / "ranking.md",
        f"# Sweep {folder.name}\n\n{table}\n{means_table(members)}{_remarks(folder, members, plan, tracking, out)}\n",
    )
    print_summary(folder, members, plan, tracking, out)
    return tracker.log_children(
        _run_folders(members),
        description=_description(folder, members, plan, links, table),
        artifacts=[folder / "ranking.csv", folder / "ranking.md", *_images(folder)],
        varied=list(varied_values(members)),
        pruned={
            Path(member.folder): member.reason for member in members if member.folder and member.status == State.PRUNED
        },
    )


def print_summary(folder: Path, members: Sequence[Member], plan: Plan, tracking: Tracking, out: Path) -> None:
    """Prints the ranking of the members, the tracker's pages and the images of a sweep."""
    print_line(f"\n{align(markdown_table(members))}")
    if means := means_table(members):
        print_line(f"\n{align(means)}")
    print_line(_remarks(folder, members, plan, tracking, out))
    for image in _images(folder):
        print_line(f"{image}")


def _remarks(folder: Path, members: Sequence[Member], plan: Plan, tracking: Tracking, out: Path) -> str:
    """Returns lines with advice and with the tracker's pages; those on one machine name the command that serves them.

    Empty if there are none.
    """
    lines = [f"{remark}\n" for remark in _sentences(members, plan)]
    links, server = tracking.sweep_links(folder, _run_folders(members)), tracking.page(out)
    lines += [f"{title}: {link}" for title, link in links.items()]
    if links and server and not server.startswith("http"):
        lines.append(f"these pages are served by: {server}")
    return "".join(f"\n{line}" for line in lines)


def _sentences(members: Sequence[Member], plan: Plan) -> list[str]:
    """Returns what the ranking says, and the command of the best member."""
    sentences = [describe_winner(members), *plan.remarks(members)]
    if ranked := rank(members):
        sentences.append(f"The command of the best member: python -m trainer {shlex.join(ranked[0].command)}")
    return [sentence for sentence in sentences if sentence]


def _description(folder: Path, members: Sequence[Member], plan: Plan, links: dict[str, str], table: str) -> str:
    """Returns the Markdown text on the tracker's page of the sweep."""
    ranked = rank(members)
    if ranked:
        result = f"**Best: {pictures.short_title(ranked[0])}**, val/loss {ranked[0].best_loss:.4f}"
    else:
        result = "**No member finished with a held-out loss**"
    # Relative links: the server may have another address when somebody reads the page.
    pages = " | ".join(
        f"[{title}]({''.join(link.partition('#')[1:])})" for title, link in links.items() if title != "summary"
    )
    parts = [
        f"{result}; {len(members)} runs, ranked by val/loss (held out; lower is better).",
        pages,
        table.rstrip(),
        means_table(members).rstrip(),
        *_sentences(members, plan),
        f"Folder: `{folder.absolute()}`",
    ]
    return "\n\n".join(part for part in parts if part)


def _run_folders(members: Sequence[Member]) -> list[Path]:
    """Returns the run folders, best first."""
    return [Path(member.folder) for member in [*rank(members), *unranked(members)] if member.folder]


def _images(folder: Path) -> list[Path]:
    return [folder / name for name in (pictures.HEAT_MAP, pictures.SAMPLES) if (folder / name).exists()]
