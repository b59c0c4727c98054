"""Loads tables with the `datasets` library, from the Hugging Face hub or from a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from trainer.core.digests import Digests
from trainer.core.errors import DataError, WeightsError
from trainer.dataset.paths import is_inside
from trainer.dataset.source import IMAGE_SUFFIXES

BUILDERS = {"arrow", "csv", "imagefolder", "json", "parquet"}
"""The builders of the library that read tables and images."""


def load_folder(folder: Path, subset: str | None, digests: Digests) -> tuple[datasets.DatasetDict, list[Path]]:
    """Loads a folder. Returns its tables, and the files that they were read from. Raises errors.DataError.

    The library's copy of the tables is stored beside the cache under a digest of all files, because the library would
    only compare times.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    state = [(path.relative_to(folder).as_posix(), digests.sha256(path)) for path in files if is_inside(folder, path)]
    digests.flush()
    name = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    try:
        with _no_progress_bars():
            builder = datasets.load_dataset_builder(
                str(folder), subset, cache_dir=str(digests.path.parent / "tables" / name)
            )
            tables = _check_builder(builder, folder)
            builder.download_and_prepare()
            return builder.as_dataset(), tables
    except (DataError, MemoryError):
        raise
    # The library raises many kinds of errors.
    except Exception as error:
        raise DataError(f"dataset.path={folder}: cannot be read as a dataset ({_reason(error)})") from error


def _check_builder(builder: datasets.DatasetBuilder, folder: Path) -> list[Path]:
    """Returns the files that a builder reads, without images: a table need not refer to all of these.

    Raises errors.DataError for formats other than tables and images, and for files outside the folder.
    """
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in BUILDERS:
        raise DataError(
            f"dataset.path={folder}: this layout reads {', '.join(sorted(BUILDERS))}, but the folder is {kind}"
        )
    found = []
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if Path(file).suffix.lower() not in IMAGE_SUFFIXES:
                found.append(Path(file))
            if not is_inside(folder, Path(file)):
                raise DataError(
                    f"dataset.path={folder}: it refers to {file}, which lies outside the folder; "
                    "put the file itself there"
                )
    return found


def load_from_hub(path: str, subset: str | None, revision: str | None) -> datasets.DatasetDict:
    """Loads a dataset of the hub. Raises errors.WeightsError."""
    try:
        return datasets.load_dataset(path, subset, revision=revision)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise WeightsError(
            f"dataset.path={path}: the dataset cannot be loaded from the hub ({_reason(error)}). "
            "Type dataset.path=FOLDER for a copy on this machine, or log in (`hf auth login`) if it is gated"
        ) from error


def download_folder() -> Path:
    """Returns the folder in which the library stores its downloads."""
    return Path(datasets.config.HF_CACHE_HOME)


def _reason(error: Exception) -> str:
    """Returns the first line of the message of an error or of its cause."""
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
