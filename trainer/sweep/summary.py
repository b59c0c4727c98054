"""The results of a sweep: tables and images in its folder, on the terminal and in the tracker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.core import files
from trainer.core.console import print_line
from trainer.sweep import pictures
from trainer.sweep.members import Member, varied_values
from trainer.sweep.ranking import align, csv_table, edge_advice, is_finite, markdown_table, rank, unranked
from trainer.tracking import Tracking
from trainer.tracking.journal import Journal
from trainer.tracking.tracker import Tracker


def summarize(
    folder: Path, members: Sequence[Member], tracking: Tracking, out: Path, tracker: Tracker, journal: Journal
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
        folder / "ranking.md", f"# Sweep {folder.name}\n\n{table}\n{_remarks(folder, members, tracking, out)}\n"
    )
    print_summary(folder, members, tracking, out)
    return tracker.log_children(
        _run_folders(members),
        description=_description(folder, members, links, table),
        artifacts=[folder / "ranking.csv", folder / "ranking.md", *_images(folder)],
        varied=list(varied_values(members)),
    )


def print_summary(folder: Path, members: Sequence[Member], tracking: Tracking, out: Path) -> None:
    """Prints the ranking of the members, the tracker's pages and the images of a sweep."""
    print_line(f"\n{align(markdown_table(members))}\n{_remarks(folder, members, tracking, out)}")
    for image in _images(folder):
        print_line(f"{image}")


def _remarks(folder: Path, members: Sequence[Member], tracking: Tracking, out: Path) -> str:
    """Returns lines with advice and with the tracker's pages; those on one machine name the command that serves them.

    Empty if there are none.
    """
    advice = edge_advice(members)
    lines = [f"{advice}\n"] if advice else []
    links, server = tracking.sweep_links(folder, _run_folders(members)), tracking.page(out)
    lines += [f"{title}: {link}" for title, link in links.items()]
    if links and server and not server.startswith("http"):
        lines.append(f"these pages are served by: {server}")
    return "".join(f"\n{line}" for line in lines)


def _description(folder: Path, members: Sequence[Member], links: dict[str, str], table: str) -> str:
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
        edge_advice(members),
        f"Folder: `{folder.absolute()}`",
    ]
    return "\n\n".join(part for part in parts if part)


def _run_folders(members: Sequence[Member]) -> list[Path]:
    """Returns the run folders, best first."""
    return [Path(member.folder) for member in [*rank(members), *unranked(members)] if member.folder]


def _images(folder: Path) -> list[Path]:
    return [folder / name for name in (pictures.HEAT_MAP, pictures.SAMPLES) if (folder / name).exists()]
