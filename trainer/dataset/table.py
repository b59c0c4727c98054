"""Layouts that are tables with named columns: their settings, and samples from the rows.

How a table is stored differs by layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.core import documents
from trainer.core.errors import DataError
from trainer.core.files import storage_errors
from trainer.dataset import Dataset
from trainer.dataset.collector import SampleCollector
from trainer.dataset.sample import Sample, check_caption, sample_id
from trainer.dataset.source import Source
from trainer.dataset.unused import MASKS

Row = Mapping[str, object]
"""Column -> value."""


@dataclass(slots=True)
class Table(Dataset):
    """Base class of the settings of layouts with named columns.

    `control_columns` name control images, `mask_column` an edit mask; without it masks/NAME.png is the mask of
    NAME.jpg.
    """

    caption_column: str = "text"
    image_column: str = "file_name"
    control_columns: list[str] = field(default_factory=list)
    mask_column: str | None = None


def collect_rows(
    collector: SampleCollector,
    settings: Table,
    rows: Iterable[tuple[str, Row | ValueError]],
    folder: Path,
    split: str | None,
) -> None:
    """Collects the samples of a table.

    `rows` are pairs of a location for messages and the row, or a ValueError if the row could not be parsed. Images are
    named relative to `folder` or to its images/.
    """
    for location, row in rows:
        collector.found += 1
        if isinstance(row, ValueError):
            collector.add_fault(f"{location}: {row}")
        else:
            _collect_row(collector, settings, location, row, folder, split)


def read_json_lines(table: Path, collector: SampleCollector) -> Iterator[tuple[str, Row | ValueError]]:
    """Yields a location for messages and the row of each line of a JSON lines file; see `collect_rows`."""
    with storage_errors("read", table):
        data = table.read_bytes()
    try:
        lines = documents.split_lines(data)
    except ValueError as error:
        raise DataError(f"{table}: {error}; save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        location = f"{collector.relative_name(table)} line {number}"
        try:
            row = documents.parse_json(line, to_row)
        except ValueError as error:
            yield location, error
            continue
        yield location, row if isinstance(row, dict) else ValueError("is not a JSON object")


def _collect_row(
    collector: SampleCollector, settings: Table, location: str, row: Row, folder: Path, split: str | None
) -> None:
    faults_before = len(collector.faults)
    path = collector.attempt(location, _find_image, collector, folder, row, settings.image_column)
    image, image_location = None, location
    if path is not None:
        image_location = f"{location} ({path.relative_to(folder)})"
        image = collector.attempt(location, collector.image_source, path)
        collector.register_id(sample_id(path.relative_to(collector.root)), image_location)
    caption = collector.attempt(location, read_caption_cell, row, settings)

    def open_cell(value: object) -> Source:
        return collector.image_source(_find_file(collector, folder, value))

    controls, mask = read_controls_and_mask(collector, settings, location, row, open_cell)
    if image is not None and settings.mask_column is None:
        mask = collector.attempt(location, _find_mask, collector, folder, image.path)
    if image is None or caption is None or len(collector.faults) > faults_before:
        return
    id = sample_id(image.path.relative_to(collector.root))
    collector.add(Sample(id, image, caption, controls, split, mask), image_location)


def read_controls_and_mask(
    collector: SampleCollector, settings: Table, location: str, row: Row, open_cell: Callable[[object], Source]
) -> tuple[tuple[Source, ...], Source | None]:
    """Returns the control images and the mask that a row names.

    `open_cell` turns the value of a cell into a source, or raises ValueError or errors.DataError.
    """
    controls = []
    for column in settings.control_columns:
        value = collector.attempt(location, read_cell, row, column, "control_columns")
        # A cell may contain a list of images, as in datasets of the Hugging Face hub.
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                if (control := collector.attempt(location, open_cell, item)) is not None:
                    controls.append(control)
            elif value is not None or column in row:
                collector.add_fault(f"{location}: its {column} names no control image")
    mask = None
    if settings.mask_column is not None:
        value = collector.attempt(location, read_cell, row, settings.mask_column, "mask_column")
        # Without a mask, the loss has its full weight everywhere.
        mask = None if value in (None, "") else collector.attempt(location, open_cell, value)
    return tuple(controls), mask


def read_cell(row: Row, column: str, key: str) -> object:
    """Returns the value in a column.

    Raises ValueError if the row has no such column; `key` is the setting that names it.
    """
    if column not in row:
        columns = ", ".join(row) or "none"
        raise ValueError(f"has no column {column!r} (its columns: {columns}); type dataset.{key}=NAME")
    return row[column]


def read_caption_cell(row: Row, settings: Table) -> str:
    """Returns the caption of a row. Raises ValueError."""
    return check_caption(read_cell(row, settings.caption_column, "caption_column"))


def to_row(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns a JSON object; a `pairs_hook` of `documents.parse_json`. Raises ValueError if a name occurs twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("has the same column twice")
    return row


def _find_image(collector: SampleCollector, folder: Path, row: Row, column: str) -> Path:
    return _find_file(collector, folder, read_cell(row, column, "image_column"))


def _find_file(collector: SampleCollector, folder: Path, name: object) -> Path:
    """Returns the file that a row names. Raises ValueError; does not touch a file outside the dataset's folder."""
    path = collector.find_file(name, folder, folder / "images")
    if path is None:
        raise ValueError(f"there is no file {name!r}, here or in images/")
    return path


def _find_mask(collector: SampleCollector, folder: Path, image: Path) -> Source | None:
    """Returns masks/NAME.* for the image NAME.* or images/NAME.*, if there is one."""
    path = image.relative_to(folder)
    if path.parts[0] == "images" and path.parts[1:]:
        path = Path(*path.parts[1:])
    return collector.find_mask(folder / MASKS / path.with_suffix(""))
