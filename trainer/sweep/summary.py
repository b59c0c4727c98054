"""The results of a sweep: tables and images in its folder, on the terminal and in the tracker."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from trainer.core import files
from trainer.core.console import print_line
from trainer.sweep.members import Member, varied_values
from trainer.sweep.ranking import align, csv_table, heat_map, is_finite, markdown_table, rank, unranked
from trainer.tracking.journal import Journal
from trainer.tracking.tracker import Tracker
from trainer.training.tracked_run import shorten_overrides

SHOWN_MEMBERS = 8
"""Number of members whose images are compared."""
SHOWN_SAMPLES = (1, 2)
"""Held-out samples whose images are compared."""


def summarize(folder: Path, members: Sequence[Member], tracker: Tracker, journal: Journal, server: str | None) -> None:
    """Writes the ranking and images to the sweep's `folder`, prints the ranking and sends both to the tracker.

    `server` is the URL of the tracker's pages, or the command that serves them.
    """
    files.write(folder / "ranking.csv", csv_table(members))
    images = [image for image in (_draw_heat_map(folder, members), _draw_samples(folder, members)) if image]
    ranked = rank(members)
    if ranked:
        # The run of the sweep shows the best results, next to runs that belong to no sweep.
        results = {"val/loss": ranked[0].best_loss, "val/psnr": ranked[0].psnr}
        journal.log_metrics(len(ranked), {name: value for name, value in results.items() if is_finite(value)})
    run_folders = [Path(member.folder) for member in [*ranked, *unranked(members)] if member.folder]
    links = tracker.links(run_folders)
    link_lines = "".join(f"\n{title}: {link}" for title, link in links.items())
    if links and server and not server.startswith("http"):
        link_lines += f"\nthese pages are served by: {server}"
    table = markdown_table(members)
    files.write(folder / "ranking.md", f"# Sweep {folder.name}\n\n{table}\n{link_lines}\n")
    print_line(f"\n{align(table)}\n{link_lines}")
    for image in images:
        print_line(f"{image}")
    tracker.log_children(
        run_folders,
        description=_description(folder, members, links, table),
        artifacts=[folder / "ranking.csv", folder / "ranking.md", *images],
        varied=list(varied_values(members)),
    )


def _description(folder: Path, members: Sequence[Member], links: dict[str, str], table: str) -> str:
    """Returns the Markdown text on the tracker's page of the sweep."""
    ranked = rank(members)
    if ranked:
        result = f"**Best: {_short_title(ranked[0])}**, val/loss {ranked[0].best_loss:.4f}"
    else:
        result = "**No member finished with a held-out loss**"
    # Relative links: the server may have another address when somebody reads the page.
    pages = " | ".join(
        f"[{title}]({''.join(link.partition('#')[1:])})" for title, link in links.items() if title != "summary"
    )
    return (
        f"{result}; {len(members)} runs, ranked by val/loss (held out; lower is better).\n\n{pages}\n\n{table}\n\n"
        f"Folder: `{folder.absolute()}`"
    )


def _draw_heat_map(folder: Path, members: Sequence[Member]) -> Path | None:
    from trainer.tracking import curves

    data = heat_map(members)
    if data is None:
        return None
    return curves.draw_heat_map(folder / "heat_map.png", "best val/loss", data.x, data.y, data.losses)


def _draw_samples(folder: Path, members: Sequence[Member]) -> Path | None:
    """Draws the last images of the first held-out samples, with the members side by side from best to worst."""
    from trainer.dataset import image_grid

    ranked = rank(members)[:SHOWN_MEMBERS]
    with contextlib.suppress(OSError, ValueError, IndexError):
        steps = [max((Path(member.folder or "") / "pictures").glob("step-*")) for member in ranked]
        rows = []
        for sample in SHOWN_SAMPLES:
            images = [image_grid.load_png(step / f"{sample}.png") for step in steps]
            if len({image.shape for image in images}) != 1:
                return None
            titles = [_short_title(member) for member in ranked]
            rows.append(image_grid.label_grid(dict(zip(titles, images, strict=True))))
        image_grid.save_png(folder / "samples.png", image_grid.stack_rows(rows))
        return folder / "samples.png"
    return None


def _short_title(member: Member) -> str:
    return shorten_overrides([f"{key}={value}" for key, value in member.varied.items()]) or f"{member.number}"
