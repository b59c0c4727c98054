"""The layout csv: a table with a header line, whose columns name pictures relative to its folder and caption them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core.errors import DataError
from trainer.core.files import Digests, storage
from trainer.dataset.reading import Listing, Reading, roles
from trainer.dataset.table import Row, collect

if TYPE_CHECKING:
    from trainer.dataset import Csv

SUFFIXES = {".csv": ",", ".tsv": "\t"}


def read(settings: Csv, digests: Digests) -> Listing:
    """One sample a row. `dataset.path` is the table, or a folder with one table, or with train.csv, validation.csv (or val) and test.csv.

    Raises errors.DataError where there is no table or several others.
    """
    path = Path(settings.path or "").expanduser()
    if settings.path and path.is_file():
        reading = Reading(path.parent, digests)
        tables: list[tuple[Path, str | None]] = [(path, None)]
    else:
        reading = Reading(settings.folder(), digests)
        tables = _tables(settings, reading)
    for table, split in tables:
        collect(reading, settings, _rows(settings, table, reading), table.parent, split)
    return reading.listing()


def _tables(settings: Csv, reading: Reading) -> list[tuple[Path, str | None]]:
    there = {
        path.stem: path for path in sorted(reading.root.iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()
    }
    if used := roles(reading, there):
        return [(there[name], split) for name, split in used.items()]
    if len(there) == 1:
        return [(path, None) for path in there.values()]
    if there:
        names = ", ".join(path.name for path in there.values())
        raise DataError(
            f"dataset.path={settings.path}: it has several tables ({names}); type dataset.path={settings.path}/NAME.csv for one."
        )
    header = f"{settings.image_column},{settings.caption_column}"
    raise DataError(f"dataset.path={settings.path}: there is no .csv in it, with a header line such as {header}")


def _rows(settings: Csv, table: Path, reading: Reading) -> Iterator[tuple[str, Row | ValueError]]:
    with storage("read", table):
        data = table.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: {error}; save it as UTF-8") from None
    delimiter = settings.delimiter or SUFFIXES.get(table.suffix.lower(), ",")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        place = f"{reading.name(table)} line {lines.line_num + 1}"
        try:
            cells = next(lines, None)
        except csv.Error as error:
            yield place, ValueError(f"{error}; what follows was not read")
            return
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            if len({*header}) < len(header):
                raise DataError(f"{place}: has the same column twice ({', '.join(header)}). Mend the header line.")
        elif len(cells) == len(header):
            yield place, dict(zip(header, (cell.strip() for cell in cells), strict=True))
        else:
            yield (
                place,
                ValueError(
                    f"has {len(cells)} cells, and the header line has {len(header)}; quote what holds a {delimiter!r}"
                ),
            )
