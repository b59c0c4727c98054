"""Samples out of the rows of a table, which name their pictures and captions by column; the layouts differ in how a table is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.dataset.reading import Reading, beside
from trainer.dataset.sample import Sample, Source, caption, identify, inside, relative

if TYPE_CHECKING:
    from trainer.dataset import Table

Row = Mapping[str, object]


def collect(
    reading: Reading, settings: Table, rows: Iterable[tuple[str, Row | ValueError]], folder: Path, split: str | None
) -> None:
    """The samples of a table whose pictures are named relative to `folder` or to its images/; a row that could not be read is a ValueError."""
    for place, row in rows:
        reading.found += 1
        if isinstance(row, ValueError):
            reading.fault(f"{place}: {row}")
            continue
        before = len(reading.faults)
        path = reading.tried(
            place, lambda row=row: _find(reading, folder, cell(row, settings.image_column, "image_column"))
        )
        where = f"{place} ({path.relative_to(folder)})" if path else place
        image = path and reading.tried(place, lambda path=path: reading.picture(path))
        id = path and identify(path.relative_to(reading.root))
        if path:
            reading.acquire(id, where)
        text = reading.tried(place, lambda row=row: caption(cell(row, settings.caption_column, "caption_column")))

        def picture(value: object) -> Source:
            return reading.picture(_find(reading, folder, value))

        controls, mask = others(reading, settings, place, row, picture)
        if image and settings.mask_column is None:
            mask = reading.tried(place, lambda path=path: _mask(reading, folder, path))
        if len(reading.faults) == before:
            reading.add(Sample(id, image, text, controls, split, mask), where)


def others(
    reading: Reading, settings: Table, place: str, row: Row, picture: Callable[[object], Source]
) -> tuple[tuple[Source, ...], Source | None]:
    """The control pictures and the mask that a row names; `picture` turns what stands in a cell into a source, or raises ValueError."""
    controls = []
    for column in settings.control_columns:
        value = reading.tried(place, lambda column=column: cell(row, column, "control_columns"))
        # A cell may hold several, as hub data sets have it.
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                controls.append(reading.tried(place, lambda item=item: picture(item)))
            elif value is not None or column in row:
                reading.fault(f"{place}: its {column} names no control picture")
    mask = None
    if settings.mask_column is not None:
        value = reading.tried(place, lambda: cell(row, settings.mask_column, "mask_column"))
        # A sample without a mask is one whose loss counts everywhere.
        mask = None if value in (None, "") else reading.tried(place, lambda: picture(value))
    return tuple(controls), mask


def cell(row: Row, column: str, key: str) -> object:
    """What stands in a column. Raises ValueError with what to type where the row has no such column."""
    if column not in row:
        names = ", ".join(row) or "none"
        raise ValueError(f"has no column {column!r} (its columns: {names}); type dataset.{key}=NAME")
    return row[column]


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For json.loads: an object whose names are all different. Raises ValueError."""
    columns = dict(pairs)
    if len(columns) < len(pairs):
        raise ValueError("has the same column twice")
    return columns


def _find(reading: Reading, folder: Path, name: object) -> Path:
    """The file a row names, or ValueError with the reason why not; a file outside the data set's folder is not even looked at."""
    path = relative(name)
    for candidate in (folder / path, folder / "images" / path):
        if not inside(reading.root, candidate):
            raise ValueError(f"{str(path)!r} is a link out of the data set's folder; put the file itself there")
        if os.path.isfile(candidate):
            return candidate
    raise ValueError(f"there is no file {str(path)!r}, here or in images/")


def _mask(reading: Reading, folder: Path, image: Path) -> Source | None:
    """masks/NAME.* for NAME.*, or for images/NAME.*."""
    path = image.relative_to(folder)
    stem = Path(*path.parts[1:]) if path.parts[0] == "images" and path.parts[1:] else path
    return beside(reading, folder / "masks", stem.with_suffix("").as_posix())


def lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file that hold something, by their number."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield number, line
