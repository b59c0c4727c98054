"""Layout `csv`: a table with a header line, whose columns name images relative to its folder, and their captions."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.core import documents
from trainer.core.digests import Digests
from trainer.core.errors import DataError, UsageError
from trainer.core.files import storage_errors
from trainer.dataset import Dataset
from trainer.dataset.collector import SampleCollector
from trainer.dataset.listing import Listing
from trainer.dataset.splitting import assign_splits
from trainer.dataset.table import Row, Table, collect_rows

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SEPARATOR_LINE = re.compile('sep=([^"\\w\\s]|\t)')
"""First line with which Excel says what separates the columns."""


@dataclass(slots=True)
class Csv(Table):
    """Images, and a table of them.

    `path` may be the table itself. `delimiter`: null for the one in the header line, a comma, semicolon or tab.
    """

    delimiter: str | None = None

    def __post_init__(self) -> None:
        Dataset.__post_init__(self)
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise UsageError(
                f"dataset.delimiter={self.delimiter!r} is not one character; type for example dataset.delimiter=';'"
            )

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Reads one sample per row; see `Dataset.read`.

        `path` is the table, or a folder with one table, or with train.csv, validation.csv (or val.csv) and test.csv.
        """
        path = Path(self.path or "").expanduser()
        tables: list[tuple[Path, str | None]] = [(path, None)]
        if self.path and path.is_file():
            collector = SampleCollector(path.parent, digests, owns_root=False)
        else:
            collector = SampleCollector(self.require_folder(), digests, ignored)
            tables = _find_tables(self, collector)
        for table, split in tables:
            collector.mark_used(table)
            collector.caption_table = table.name
            collect_rows(collector, self, _read_rows(self, table, collector), table.parent, split)
        return collector.to_listing()


def _find_tables(settings: Csv, collector: SampleCollector) -> list[tuple[Path, str | None]]:
    """Returns the tables in the folder, and the split of each."""
    files = (path for path in sorted(collector.root.iterdir()) if path.is_file())
    tables = {path.stem: path for path in files if path.suffix.lower() in DELIMITERS}
    if splits := assign_splits(collector, tables):
        return [(tables[name], split) for name, split in splits.items()]
    if len(tables) == 1:
        return [(path, None) for path in tables.values()]
    if tables:
        names = ", ".join(path.name for path in tables.values())
        raise DataError(
            f"dataset.path={settings.path}: it has several tables ({names}); "
            f"type dataset.path={settings.path}/NAME.csv for one."
        )
    header = f"{settings.image_column},{settings.caption_column}"
    raise DataError(f"dataset.path={settings.path}: there is no .csv in it, with a header line such as {header}")


def _read_rows(settings: Csv, table: Path, collector: SampleCollector) -> Iterator[tuple[str, Row | ValueError]]:
    with storage_errors("read", table):
        data = table.read_bytes()
    try:
        text = documents.decode(data)
    except ValueError as error:
        raise DataError(f"{table}: {error}; save it as UTF-8") from None
    delimiter = settings.delimiter or _find_delimiter(settings, table, collector, text)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        location = f"{collector.relative_name(table)} line {lines.line_num + 1}"
        try:
            cells = next(lines, None)
        except csv.Error as error:
            yield location, ValueError(f"{error}; the lines after it were not read")
            return
        if cells is None:
            return
        cells = [cell.strip() for cell in cells]
        if not any(cells) or (lines.line_num == 1 and SEPARATOR_LINE.fullmatch(delimiter.join(cells))):
            continue
        if not header:
            header = cells
            if len({*header}) < len(header):
                raise DataError(f"{location}: has the same column twice ({', '.join(header)}). Fix the header line.")
        elif len(cells) == len(header):
            yield location, dict(zip(header, cells, strict=True))
        else:
            counts = f"has {len(cells)} cells, and the header line has {len(header)}"
            yield location, ValueError(f"{counts}; put cells that contain a {delimiter!r} in quotes")


def _find_delimiter(settings: Csv, table: Path, collector: SampleCollector, text: str) -> str:
    """Returns the delimiter that is usual for the ending of a table, unless its header line has another one.

    Spreadsheets write semicolons or tabs where a comma is the decimal separator.
    """
    usual = DELIMITERS.get(table.suffix.lower(), ",")
    first = text.lstrip().partition("\n")[0].strip()
    if match := SEPARATOR_LINE.fullmatch(first):
        return match[1]
    for delimiter in dict.fromkeys((usual, ",", ";", "\t")):
        cells = [cell.strip().strip('"') for cell in first.split(delimiter)]
        if {settings.image_column, settings.caption_column} <= {*cells}:
            if delimiter != usual:
                collector.notes.append(f"{table.name}: its columns are separated by {delimiter!r}")
            return delimiter
    return usual
