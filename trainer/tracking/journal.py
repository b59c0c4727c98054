"""The journal of a run: an append-only file with one JSON object per line, readable even if its writer dies.

    {"time": 1763646000.1, "kind": "metrics", "step": 7, "values": {"train/loss": 0.25, "train/grad_norm": "Infinity"}}
    {"time": 1763646001.4, "kind": "picture", "step": 7, "key": "samples/0", "path": "pictures/0.png", "caption": "..."}
    {"time": 1763646002.7, "kind": "checkpoint", ...}

Times are for human readers only, since a clock may be set back. The order of events is that of the lines and steps.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from trainer.core import documents, errors, files

FILE_NAME = "journal.jsonl"
METRICS = "metrics"
"""Kind of a record with values measured at a step."""
IMAGE = "picture"
"""Kind of a record about an image file."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

log = logging.getLogger(__name__)


def read_records(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each record of a journal from byte `start` on, with the byte at which the next record starts.

    Metric values are floats, which may be NaN or infinite. A missing file has no records. A last line that is still
    being written and lines damaged by a power failure are skipped.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        return
    with file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            record = _parse(line)
            if record is not None:
                yield start, record


class Journal:
    """The journal in a run folder, open for appending by the process that owns the folder.

    A resumed run repeats the steps since its last checkpoint; values and images that the journal already has are not
    written again. While the disk is full, records are kept in memory and written with a later record, or at the latest
    by `close`.

    Attributes:
        path: The file.
        counts: Number of records by kind.

    Raises errors.StorageError if the file cannot be opened or written.
    """

    __slots__ = ("_descriptor", "_image_steps", "_lock", "_metric_steps", "_unwritten", "counts", "path")

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME
        self.counts: Counter[str] = Counter()
        # Steps only grow, so the last step of each key tells which values the journal has.
        self._metric_steps: dict[str, int] = {}
        self._image_steps: dict[str, int] = {}
        self._unwritten = bytearray()
        # Any thread may log a warning. The warning about a full disk comes from this class itself.
        self._lock = threading.RLock()
        with files.storage_errors("open", self.path):
            self._descriptor = files.open_plain(self.path, os.O_RDWR | os.O_APPEND)
            self._repair_last_line()
            for record in self.records():
                self._count(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Writes values measured after `step` optimizer steps, except those that the journal has."""
        new = {key: _to_json(value) for key, value in values.items() if step > self._metric_steps.get(key, -1)}
        if new:
            self._write({"time": _now(), "kind": METRICS, "step": int(step), "values": new})

    def log_image(self, step: int, key: str, path: str | Path, caption: str = "") -> None:
        """Records that the image `key` of `step` is at `path` (relative to the folder), unless the journal has it."""
        if step > self._image_steps.get(key, -1):
            image = {"key": key, "path": Path(path).as_posix(), "caption": caption}
            self._write({"time": _now(), "kind": IMAGE, "step": int(step), **image})

    def log_event(self, kind: str, **fields: Any) -> None:
        """Writes an event: `kind` is one word ("attempt", "checkpoint", "warning"), `fields` are JSON values."""
        if kind in (METRICS, IMAGE) or "time" in fields:
            raise ValueError(
                f"{kind!r} with {sorted(fields)} is not an event: metrics and images have their own methods, and "
                "the time is added here"
            )
        values = {key: _to_json(value) if isinstance(value, float) else value for key, value in fields.items()}
        self._write({"time": _now(), "kind": kind, **values})

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields all records, oldest first."""
        return (record for _, record in read_records(self.path))

    def close(self) -> None:
        """Writes everything to the disk and closes the file; a second call does nothing."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            with files.storage_errors("write", self.path):
                while self._unwritten:
                    del self._unwritten[: os.write(descriptor, self._unwritten)]
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _write(self, record: dict[str, Any]) -> None:
        # One write per line and no fsync: written bytes are in the kernel's page cache, which outlives a SIGKILL of
        # this process. Only a power failure loses them, and then at most the steps since the last synced checkpoint,
        # which are repeated anyway. An fsync per line would take longer than a step of a small model.
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=str)
        with self._lock, files.storage_errors("write", self.path):
            was_full = bool(self._unwritten)
            self._unwritten += text.encode("utf-8", "backslashreplace") + b"\n"
            try:
                while self._unwritten:
                    del self._unwritten[: os.write(self._descriptor, self._unwritten)]
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
                if not was_full:
                    log.warning(
                        "%s: %s. Records are kept in memory and written when there is space.", self.path, error.strerror
                    )
            self._count(record)

    def _count(self, record: dict[str, Any]) -> None:
        self.counts[record["kind"]] += 1
        if record["kind"] == METRICS:
            for key in record["values"]:
                self._metric_steps[key] = max(record["step"], self._metric_steps.get(key, -1))
        elif record["kind"] == IMAGE:
            self._image_steps[record["key"]] = max(record["step"], self._image_steps.get(record["key"], -1))

    def _repair_last_line(self) -> None:
        """Ends a last line that has no line break: with a line break if the record is complete, else by removing it."""
        size = start = os.fstat(self._descriptor).st_size
        tail = b""
        while start > 0 and b"\n" not in tail:
            start = max(0, start - 65536)
            tail = os.pread(self._descriptor, size - start, start)
        tail = tail[tail.rfind(b"\n") + 1 :]
        if not tail:
            return
        if _parse(tail) is None:
            os.ftruncate(self._descriptor, size - len(tail))
        else:
            os.write(self._descriptor, b"\n")


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the record on a line of a journal; None if the line is damaged."""
    try:
        record = documents.expect(documents.parse_json(line, any_text=True), dict, "")
        kind = documents.entry(record, "kind", str, "")
        documents.entry(record, "time", float, "")
        if kind in (METRICS, IMAGE):
            record["step"] = int(documents.entry(record, "step", float, ""))
        if kind == METRICS:
            values = documents.entry(record, "values", dict, "")
            record["values"] = {key: float(value) for key, value in values.items()}
        elif kind == IMAGE:
            record["key"], record["path"] = (documents.entry(record, name, str, "") for name in ("key", "path"))
        return record
    except (errors.DataError, ValueError, TypeError, OverflowError):
        return None


def _to_json(value: float) -> float | str:
    # JSON has no NaN or infinity. Every reader accepts them as text, and float() converts them back.
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _now() -> float:
    return round(time.time(), 3)
