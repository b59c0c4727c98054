"""Loads tables with the `datasets` library, from the Hugging Face hub or from a folder."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from trainer.core import documents
from trainer.core.digests import Digests
from trainer.core.errors import DataError, WeightsError
from trainer.core.hub import download_advice
from trainer.dataset.image_formats import IMAGE_SUFFIXES
from trainer.dataset.paths import is_inside

BUILDERS = {"arrow", "csv", "imagefolder", "json", "parquet"}
"""The builders of the library that read tables and images."""
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}


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
        with _quiet_library():
            cache = str(digests.path.parent / "tables" / name)
            builder = datasets.load_dataset_builder(str(folder), subset, cache_dir=cache)
            tables = _check_builder(builder, folder)
            if (
                any(JSON_SUFFIXES.intersection(path.suffixes) for path in tables)
                and not Path(builder.cache_dir).exists()
            ):
                _prepare_in_child(folder, subset, cache, tables)
            builder.download_and_prepare()
            return _validate(builder.as_dataset()), tables
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


def _prepare_in_child(folder: Path, subset: str | None, cache: str, tables: list[Path]) -> None:
    """Prepares a dataset in a process of its own. The parser of JSON crashes for some inputs, such as deep nesting.

    Raises errors.DataError.
    """
    command = [sys.executable, "-m", __name__, str(folder), cache, *([subset] if subset else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if done.returncode:
        reason = done.stdout.strip() or _find_faulty_line(tables) or f"the reader crashed with {done.returncode}"
        raise DataError(f"dataset.path={folder}: cannot be read as a dataset ({reason}). Fix the file.")


def _find_faulty_line(tables: list[Path]) -> str | None:
    """Returns the first line of the JSON files that is not an object, and the reason, if there is one."""
    for path in (path for path in tables if path.suffix in JSON_SUFFIXES):
        for number, line in enumerate(documents.split_lines(path.read_bytes()), 1):
            try:
                if line.strip() and not isinstance(documents.parse_json(line), dict):
                    return f"{path.name} line {number}: is not a JSON object"
            except ValueError as error:
                return f"{path.name} line {number}: {error}"
    return None


def _prepare(folder: str, cache: str, subset: str | None = None) -> int:
    """Main function of the child: prepares a dataset. Returns 0, or prints the reason and returns 1."""
    try:
        datasets.load_dataset_builder(folder, subset, cache_dir=cache).download_and_prepare()
    except Exception as error:
        print(_reason(error))
        return 1
    return 0


def _validate(tables: datasets.DatasetDict) -> datasets.DatasetDict:
    """Returns the tables. Raises an error of the library if values in them would crash the process when they are read.

    The library maps the files into memory as they are.
    """
    for table in tables.values():
        table.data.validate(full=True)
    return tables


def load_from_hub(path: str, subset: str | None, revision: str | None) -> datasets.DatasetDict:
    """Loads a dataset of the hub. Raises errors.WeightsError."""
    try:
        return _validate(datasets.load_dataset(path, subset, revision=revision))
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise WeightsError(
            f"dataset.path={path}: the dataset cannot be loaded from the hub ({_reason(error)}). "
            f"Type dataset.path=FOLDER for a copy on this machine, {download_advice(error)}"
        ) from error


def download_folder() -> Path:
    """Returns the folder in which the library stores its downloads."""
    return Path(datasets.config.HF_CACHE_HOME)


def _reason(error: Exception) -> str:
    """Returns the first line of the message of an error or of its cause."""
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Turns off the progress bars of the library, and its messages on errors that it raises in any case."""
    shows_bars, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shows_bars:
            datasets.enable_progress_bars()


if __name__ == "__main__":
    sys.exit(_prepare(*sys.argv[1:]))
