"""Layout `hub`: a dataset of the Hugging Face hub, or a folder of the same form (Parquet, Arrow, JSON, CSV, images)."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trainer.core.digests import Digests
from trainer.core.errors import DataError, UsageError
from trainer.dataset import Dataset
from trainer.dataset.collector import SampleCollector
from trainer.dataset.listing import Listing
from trainer.dataset.sample import Sample
from trainer.dataset.source import Source
from trainer.dataset.splitting import assign_splits
from trainer.dataset.table import Table, read_caption_cell, read_cell, read_controls_and_mask

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

    from trainer.dataset.buckets import Size


@dataclass(slots=True)
class Hub(Table):
    """A dataset of the Hugging Face hub, or a folder of the same form. The hub calls `subset` a configuration.

    `validation_split`: null takes validation, val or test, if there is one.
    """

    image_column: str = "image"
    subset: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None

    def for_regularization(self) -> Self:
        settings = Dataset.for_regularization(self)
        return replace(settings, subset=None, revision=None, train_split="train", validation_split=None)

    def read(self, digests: Digests, ignored: Iterable[Path] = ()) -> Listing:
        """Reads one sample per row; see `Dataset.read`.

        Raises errors.WeightsError if the hub cannot provide the dataset.
        """
        if not self.path:
            raise UsageError(
                "This dataset needs a name: type dataset.path=OWNER/NAME (of the hub), or dataset.path=FOLDER."
            )
        from trainer.dataset import hub_loading

        folder = Path(self.path).expanduser()
        if folder.is_dir():
            collector = SampleCollector(folder, digests, ignored)
            tables, files = hub_loading.load_folder(folder, self.subset, digests)
            collector.mark_used(*files)
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.path) and not self.path.startswith("."):
            tables = hub_loading.load_from_hub(self.path, self.subset, self.revision)
            # Images that are files must lie where the library stores its downloads.
            collector = SampleCollector(hub_loading.download_folder(), digests, owns_root=False)
        else:
            raise DataError(
                f"dataset.path={self.path}: there is no such folder (looked for {folder.absolute()}), "
                "and it is not a name on the hub."
            )
        for name, split in self._assign_splits(collector, list(tables)).items():
            _collect_rows(collector, self, tables[name], name, split)
        return collector.to_listing()

    def _assign_splits(self, collector: SampleCollector, names: list[str]) -> dict[str, str | None]:
        """Maps the parts that are used to their splits. Raises errors.UsageError."""
        for key in ("train_split", "validation_split"):
            name = getattr(self, key)
            if name is not None and name not in names:
                raise UsageError(
                    f"dataset.{key}={name}: the dataset has {', '.join(names)}; type dataset.{key}=NAME for one of them"
                )
        return assign_splits(collector, names, self.train_split, self.validation_split)


@dataclass(slots=True, frozen=True)
class CellSource:
    """An image whose bytes are in a table; see `trainer.dataset.source.Source`.

    `position` is its index in a cell with a list.
    """

    file: Path
    column: str
    index: int
    position: int | None
    table: datasets.Dataset = field(repr=False, compare=False)
    digests: Digests = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        position = "" if self.position is None else f"[{self.position}]"
        return f"{self.table.split} row {self.index} {self.column}{position}"

    def digest(self) -> str:
        return self.memoize("", lambda: hashlib.sha256(self._bytes()).hexdigest())

    def memoize(self, key: str, compute: Callable[[], str]) -> str:
        # The library never rewrites the file of a table: different data is in a different file.
        return self.digests.get_or_compute(self.file, f"[{self.column}/{self.index}/{self.position}]{key}", compute)

    def size(self) -> Size:
        from trainer.dataset.image import open_image, upright_size

        with open_image(io.BytesIO(self._bytes()), self.name) as image:
            return upright_size(image)

    def open(self) -> Image:
        from trainer.dataset.image import decode, open_image

        with open_image(io.BytesIO(self._bytes()), self.name) as image:
            return decode(image)

    def _bytes(self) -> bytes:
        value = self.table.data.column(self.column)[self.index].as_py()
        value = value if self.position is None else value[self.position]
        return value if isinstance(value, bytes) else value["bytes"]


@dataclass(slots=True, frozen=True)
class _ImageCell:
    """An image in a cell, or in the list of a cell, which is not opened yet."""

    open: Callable[[], Source]

    def __repr__(self) -> str:
        return "an image"


@dataclass(slots=True, frozen=True)
class _Row(Mapping[str, object]):
    """A row of a table, each of whose cells is read when it is asked for; images are `_ImageCell`s.

    `file` is that of the table, for which digests of images are stored.
    """

    collector: SampleCollector
    table: datasets.Dataset
    file: Path
    index: int

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.column_names)

    def __len__(self) -> int:
        return len(self.table.column_names)

    def __getitem__(self, column: str) -> object:
        """Returns the value of a cell. Raises KeyError, ValueError."""
        if column not in self.table.column_names:
            raise KeyError(column)
        try:
            value = self.table.data.column(column)[self.index].as_py()
        # Values that Python cannot hold, such as dates after the year 9999.
        except Exception as error:
            raise ValueError(f"its {column} cannot be read ({error})") from None
        if isinstance(value, list):
            return [self._to_cell(column, item, position) for position, item in enumerate(value)]
        return self._to_cell(column, value, None)

    def _to_cell(self, column: str, value: Any, position: int | None) -> object:
        """Returns a value, or what opens the image in it: bytes, or a struct of bytes or a path as in `datasets`."""
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(content, bytes) and content:
            collector = self.collector
            source = CellSource(self.file, column, self.index, position, self.table, collector.digests)
            return _ImageCell(lambda: source)
        if not isinstance(value, dict) or not value.keys() <= {"bytes", "path"}:
            return value
        if isinstance(content, str):
            raise ValueError(f"its {column} has text for the bytes of an image; write it as a file, or to Parquet")
        return _ImageCell(lambda: self._open_file(path)) if isinstance(path, str) and path else None

    def _open_file(self, path: str) -> Source:
        # The library makes the paths of the files that it finds absolute.
        return self.collector.image_source(self.collector.root / path)


def _collect_rows(
    collector: SampleCollector, settings: Hub, table: datasets.Dataset, name: str, split: str | None
) -> None:
    # Digests of images are stored for the file of the table. A table in memory has no file.
    file = Path(table.cache_files[0]["filename"]) if table.cache_files else collector.digests.path
    for index in range(len(table)):
        collector.found += 1
        faults_before = len(collector.faults)
        location = f"{name} row {index}"
        row = _Row(collector, table, file, index)
        image = collector.attempt(location, _open_image_cell, row, settings.image_column)
        caption = collector.attempt(location, read_caption_cell, row, settings)
        controls, mask = read_controls_and_mask(collector, settings, location, row, _open_cell)
        if image is not None and caption is not None and len(collector.faults) == faults_before:
            collector.add(Sample(f"{name}-{index:08d}", image, caption, controls, split, mask), location)


def _open_image_cell(row: Mapping[str, object], column: str) -> Source:
    return _open_cell(read_cell(row, column, "image_column"), column)


def _open_cell(value: object, column: str = "cell") -> Source:
    """Returns the image of a cell after a check of its header. Raises ValueError, errors.DataError."""
    if not isinstance(value, _ImageCell):
        raise ValueError(f"its {column} is {value!r:.60}, not an image; name another column")
    source = value.open()
    source.size()
    return source
