"""The layout hub: a data set of the Hugging Face hub, or a folder of the same form (parquet, arrow, JSON, CSV, pictures), through `datasets`."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from trainer.core.errors import DataError, UsageError, WeightsError
from trainer.core.files import Digests
from trainer.dataset.picture import decode, opened, upright_size
from trainer.dataset.reading import Listing, Reading, roles
from trainer.dataset.sample import Sample, Source, caption, inside
from trainer.dataset.table import cell, others

if TYPE_CHECKING:
    import datasets

    from trainer.dataset import Hub

BUILDERS = {"arrow", "csv", "imagefolder", "json", "parquet"}
"""Of the library's readers those of tables and pictures."""


@dataclass(slots=True, frozen=True)
class Cell:
    """A picture whose bytes stand in a table; see `trainer.dataset.sample.Source`. `position` is its place in a cell that holds a list."""

    file: Path
    column: str
    index: int
    position: int | None
    rows: datasets.Dataset = field(repr=False, compare=False)
    digests: Digests = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.rows.split} row {self.index} {self.column}" + (
            "" if self.position is None else f"[{self.position}]"
        )

    def digest(self) -> str:
        return self.remember("", lambda: hashlib.sha256(self._bytes()).hexdigest())

    def remember(self, what: str, make: Callable[[], str]) -> str:
        # A table's file is never written to again: other data come in another file.
        return self.digests.remembered(self.file, f"[{self.column}/{self.index}/{self.position}]{what}", make)

    def size(self) -> tuple[int, int]:
        with opened(io.BytesIO(self._bytes()), self.name) as image:
            return upright_size(image)

    def open(self) -> Image.Image:
        with opened(io.BytesIO(self._bytes()), self.name) as image:
            return decode(image)

    def _bytes(self) -> bytes:
        value = self.rows.data.column(self.column)[self.index].as_py()
        return (value if self.position is None else value[self.position])["bytes"]


def read(settings: Hub, digests: Digests) -> Listing:
    """One sample a row. Raises errors.DataError for a folder that is no data set, errors.WeightsError where the hub has none to give."""
    if not settings.path:
        raise UsageError(
            "This data set needs a name: type dataset.path=OWNER/NAME (of the hub), or dataset.path=FOLDER."
        )
    folder = Path(settings.path).expanduser()
    if folder.is_dir():
        reading = Reading(folder, digests)
        parts = _local(settings, folder, digests)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", settings.path) and not settings.path.startswith("."):
        parts = _from_hub(settings)
        # Where the library keeps what it downloads: a picture that is a file must lie there.
        reading = Reading(_downloads(), digests)
    else:
        raise DataError(
            f"dataset.path={settings.path}: there is no such folder (looked for {folder.absolute()}), and it is no name on the hub."
        )
    for name, split in _splits(settings, reading, list(parts)).items():
        _rows(reading, settings, parts[name], name, split)
    return reading.listing()


def _local(settings: Hub, folder: Path, digests: Digests) -> datasets.DatasetDict:
    """A folder as the library reads it. Its tables are kept beside the cache under a digest of all files, for the library asks only for
    their times."""
    import datasets

    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    state = [(path.relative_to(folder).as_posix(), digests.of(path)) for path in files if inside(folder, path)]
    digests.flush()
    name = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    with _quiet(), _told(settings, DataError):
        builder = datasets.load_dataset_builder(
            str(folder), settings.subset, cache_dir=str(digests.path.parent / "tables" / name)
        )
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in BUILDERS:
            raise DataError(
                f"dataset.path={settings.path}: this layout reads {', '.join(sorted(BUILDERS))}, and the folder is {kind}"
            )
        outside = [
            file
            for files in (builder.config.data_files or {}).values()
            for file in files
            if not inside(folder, Path(file))
        ]
        if outside:
            raise DataError(
                f"dataset.path={settings.path}: it refers to {outside[0]}, which lies outside the folder; put the file itself there"
            )
        builder.download_and_prepare()
        return builder.as_dataset()


def _from_hub(settings: Hub) -> datasets.DatasetDict:
    import datasets

    with _told(settings, WeightsError):
        return datasets.load_dataset(settings.path, settings.subset, revision=settings.revision)


def _downloads() -> Path:
    import datasets

    return Path(datasets.config.HF_CACHE_HOME)


@contextmanager
def _quiet() -> Iterator[None]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _told(settings: Hub, kind: type[DataError] | type[WeightsError]) -> Iterator[None]:
    """The library's errors, of many kinds, as one that says what to do."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if kind is DataError:
            raise DataError(f"dataset.path={settings.path}: cannot be read as a data set ({reason})") from error
        raise WeightsError(
            f"dataset.path={settings.path}: the data set is not to be had from the hub ({reason}). Type dataset.path=FOLDER for a copy on this "
            "machine, or log in (`hf auth login`) where it is gated"
        ) from error


def _splits(settings: Hub, reading: Reading, there: list[str]) -> dict[str, str | None]:
    """The parts to be used, and the split each is. Raises errors.UsageError."""
    for key in ("train_split", "validation_split"):
        name = getattr(settings, key)
        if name is not None and name not in there:
            raise UsageError(
                f"dataset.{key}={name}: the data set has {', '.join(there)}; type dataset.{key}=NAME for one of them"
            )
    return roles(reading, there, settings.train_split, settings.validation_split)


def _rows(reading: Reading, settings: Hub, rows: datasets.Dataset, name: str, split: str | None) -> None:
    columns = rows.column_names
    # The table's file tells whether what is remembered of its pictures still holds; a table in memory has none.
    file = Path(rows.cache_files[0]["filename"]) if rows.cache_files else reading.digests.path

    for index in range(len(rows)):
        reading.found += 1
        before = len(reading.faults)
        place = f"{name} row {index}"
        row = {column: _pictures(reading, rows, file, column, index) for column in columns}

        image = reading.tried(
            place, lambda row=row: _opened(cell(row, settings.image_column, "image_column"), settings.image_column)
        )
        text = reading.tried(place, lambda row=row: caption(cell(row, settings.caption_column, "caption_column")))
        controls, mask = others(reading, settings, place, row, _opened)
        if len(reading.faults) == before:
            reading.add(Sample(f"{name}-{index:08d}", image, text, controls, split, mask), place)


def _pictures(reading: Reading, rows: datasets.Dataset, file: Path, column: str, index: int) -> Any:
    """What stands in a cell, pictures as functions that give their source."""

    def lazily(value: Any, position: int | None) -> Any:
        if not isinstance(value, dict) or not {"bytes", "path"} <= value.keys():
            return value
        if value["bytes"]:
            return lambda: Cell(file, column, index, position, rows, reading.digests)
        return (lambda: reading.picture(Path(value["path"]))) if value["path"] else None

    value = rows.data.column(column)[index].as_py()
    if isinstance(value, list):
        return [lazily(item, position) for position, item in enumerate(value)]
    return lazily(value, None)


def _opened(value: Any, column: str = "cell") -> Source:
    """The picture of a cell, judged by its header. Raises ValueError, errors.DataError."""
    if not callable(value):
        raise ValueError(f"its {column} is {value!r:.60}, not a picture; name another column")
    source = value()
    source.size()
    return source
