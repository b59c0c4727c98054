"""Writes report.html: settings, curves, measurements with intervals, images side by side, warnings and commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.comparison.record import FILE_NAME, Comparison, Measurement
from trainer.config.identity import flatten
from trainer.core import documents, files
from trainer.report import html
from trainer.tracking import curves, journal
from trainer.training.run_folder import read_manifest

REPORT = "report.html"
SHOWN = 24
"""Largest number of prompts and seeds in the grid."""
MAX_SIDE = 768
"""Of an image in the grid, in pixels."""


def write_report(path: Path, run_folders: Sequence[Path], evaluation: Path | None) -> None:
    """Writes a report about the runs in `run_folders`, the first of which is compared with the others.

    `evaluation` is the folder of their comparison; None if there is none. Raises errors.DataError if a file is damaged
    or an image is missing; an existing report then stays as it is.
    """
    comparison = None if evaluation is None else Comparison.read(evaluation)
    names = [folder.name for folder in run_folders]
    warnings = [text for folder in run_folders for text in _warnings(folder, len(run_folders) > 1)]
    body = ""
    if comparison and evaluation:
        warnings += comparison.warnings()
        body += html.section("Result", html.bullets(comparison.verdicts()) + _measurements(comparison))
        body += html.section("Images", _grid(comparison, evaluation))
    else:
        body += html.section("Images of the last evaluation", _strips(run_folders[0]))
    body = html.section("Warnings", html.paragraphs(dict.fromkeys(warnings), "warning")) + body
    body += html.section("Curves", "".join(_curves(folder) for folder in run_folders))
    body += html.section("Settings", _settings(run_folders))
    body += html.section("Do it again", _commands(run_folders, comparison, evaluation is not None))
    title = " compared with ".join([names[0], ", ".join(names[1:])]) if len(names) > 1 else f"Run {names[0]}"
    files.write(path, html.page(title, body))


def latest_evaluation(run_folder: Path) -> Path | None:
    """Returns the folder of a run's last comparison with its base; None if there is none. Raises errors.DataError."""
    found = []
    for path in (run_folder / "evaluation").glob(f"step-*/{FILE_NAME}"):
        # Files of earlier versions have no comparison.
        if "comparison" in documents.expect(documents.read_json(path), dict, str(path)):
            found.append((path.stat().st_mtime_ns, path.parent))
    return max(found)[1] if found else None


def _warnings(folder: Path, named: bool) -> list[str]:
    """Returns the warnings of a run's journal."""
    texts = []
    for _, record in journal.read_records(folder / journal.FILE_NAME):
        if record["kind"] == "warning" and isinstance(record.get("text"), str):
            texts.append(record["text"])
        elif record["kind"] == "left_out" and isinstance(record.get("faults"), list):
            texts.append(f"{len(record['faults'])} faulty samples were left out; the journal lists them")
    return [f"{folder.name}: {text}" if named else text for text in texts]


def _measurements(comparison: Comparison) -> str:
    """Returns the table of metrics: a column for each network, with intervals."""
    names = [network.name for network in comparison.networks]
    rows = []
    for name in dict.fromkeys(name for network in comparison.networks for name in network.metrics):
        # The losses at single times are too many, and the PSNR is among the measurements.
        if name == "val/loss":
            values = [network.metrics.get(name) for network in comparison.networks]
            cells = [html.cell("" if value is None else f"{value:.4g}") for value in values]
            rows.append([html.cell(name, "held-out samples"), *cells])
    rows += [_measurement(measurement, names) for measurement in comparison.measurements]
    text = html.table(["metric", *names], rows)
    if comparison.left_out:
        reasons = [f"{name}: {reason}" for name, reason in comparison.left_out.items()]
        text += html.folded(f"{len(reasons)} metrics were left out", html.bullets(reasons))
    note = (
        "Below each value is its 95 % bootstrap interval over prompts. Two networks are compared by the same prompts "
        "and seeds, so intervals that overlap may still belong to values that differ by more than chance."
    )
    return text + html.paragraphs([note], "soft")


def _measurement(measurement: Measurement, names: Sequence[str]) -> list[str]:
    arrow = {"higher": "higher is better", "lower": "lower is better"}.get(measurement.better or "", "")
    about = ", ".join(text for text in (measurement.unit, arrow, measurement.model) if text)
    cells = [html.cell(measurement.title, about)]
    for name in names:
        value, low, high = measurement.estimates[name]
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        cells.append(html.cell(f"{value:.4g}", interval))
    return cells


def _grid(comparison: Comparison, folder: Path) -> str:
    """Returns the pictures: a row for each prompt and seed, a column for each network."""
    names = [network.name for network in comparison.networks]
    shown = comparison.pictures[:SHOWN]
    titles = list(dict.fromkeys(title for picture in shown for title in picture.references))
    controls = [title for title in titles if title != "target"]
    columns = [*controls, *names, *(["target"] if "target" in titles else [])]
    rows = []
    for number, row in enumerate(shown):
        cells = [html.cell(row.caption, f"seed {row.seed}", "caption")]
        for column in columns:
            path = row.images.get(column) or row.references.get(column)
            image = html.picture(folder / path, f"{column}: {row.caption}", MAX_SIDE) if path else ""
            cells.append(f"<td>{image}{_notes(comparison, column, number)}</td>")
        rows.append(cells)
    more = len(comparison.pictures) - len(shown)
    hint = f" The first {len(shown)} of {len(comparison.pictures)}; the others are in the folders." if more else ""
    text = f"The same prompts and seeds for each network. Click an image to enlarge it; the arrow keys move on.{hint}"
    return html.paragraphs([text], "soft") + html.table(["prompt", *columns], rows, "grid")


def _notes(comparison: Comparison, name: str, number: int) -> str:
    notes = [measurement.notes[name][number] for measurement in comparison.measurements if name in measurement.notes]
    return "".join(f"<small>{escape(note)}</small>" for note in notes)


def _strips(folder: Path) -> str:
    """Returns the images of the last evaluation in training, for a run that `stage=evaluate` has not compared."""
    steps = sorted((folder / "pictures").glob("step-*"))
    if not steps:
        return ""
    hint = f"Type stage=evaluate run={folder.name} for measurements and a comparison with the base model."
    images = [html.picture(path, path.stem, 2 * MAX_SIDE) for path in sorted(steps[-1].glob("*-strip.png"))]
    return html.paragraphs([hint], "soft") + "".join(f"<p>{image}</p>" for image in images)


def _curves(folder: Path) -> str:
    path = folder / "training_curves.png"
    if not path.is_file():
        if not (folder / journal.FILE_NAME).is_file():
            return ""
        path = curves.draw_curves(folder)
    return f"<p><b>{escape(folder.name)}</b></p>" + html.picture(path, f"curves of {folder.name}", 1600)


def _settings(folders: Sequence[Path]) -> str:
    """Returns the settings that decide the weights, those that differ first."""
    settings = [flatten(read_manifest(folder)["settings"]) for folder in folders]
    keys = sorted({key for values in settings for key in values})
    rows: dict[bool, list[list[str]]] = {True: [], False: []}
    for key in keys:
        texts = [_text(values.get(key, "")) for values in settings]
        differs = len(set(texts)) > 1
        rows[differs].append([html.cell(key), *(html.cell(text, style="differs" if differs else "") for text in texts)])
    head = ["setting", *(folder.name for folder in folders)]
    if len(folders) == 1:
        return html.folded(f"{len(keys)} settings", html.table(head, rows[False]))
    same = html.folded(f"{len(rows[False])} settings are the same", html.table(head, rows[False]))
    return html.table(head, rows[True]) + same


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _commands(folders: Sequence[Path], comparison: Comparison | None, evaluated: bool) -> str:
    commands = [text for folder in folders if (text := _training_command(folder))]
    if comparison:
        commands.append(comparison.command)
    report = ["python", "-m", "trainer", "stage=report", f"run={folders[0]}"]
    if len(folders) > 1:
        report.append(f"evaluation.against=[{','.join(map(str, folders[1:]))}]")
    return f"<pre>{escape(chr(10).join([*commands, shlex.join(report)]))}</pre>"


def _training_command(folder: Path) -> str | None:
    """Returns the command that trained a run; None for runs of earlier versions, whose journal does not have it."""
    found = None
    for _, record in journal.read_records(folder / journal.FILE_NAME):
        if record["kind"] == "command" and isinstance(record.get("text"), str):
            found = record["text"]
    return found
