"""The run's own record of what happened: append-only, one JSON object a line, readable after any death of its writer.

    {"time": 1763646000.123, "kind": "metrics", "step": 7, "values": {"train/loss": 0.25, "train/gradient_norm": "Infinity"}}
    {"time": 1763646001.456, "kind": "picture", "step": 7, "key": "samples/0", "path": "pictures/step-00000007/0.png", "caption": "..."}
    {"time": 1763646002.789, "kind": "checkpoint", ...}

Times are for people (a clock may be set back); the order is that of the lines, and of the steps.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from trainer.core import files

FILE_NAME = "journal.jsonl"
METRICS = "metrics"
PICTURE = "picture"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

log = logging.getLogger(__name__)


def read(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record from byte `start` of a journal, with the byte where the next one begins; ends before a line still being written.

    Values of metrics come as floats, NaN and infinities included. A missing file has no records; lines that a power cut spoiled are left out.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (a generator closes it below)
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
    """The journal of the run in `folder`, open for appending by one thread of the one process that owns the folder.

    A resumed run walks again over steps that it had journaled but not saved; what is known of them is not written again.
    `counts` is how many records of each kind there are. Raises errors.StorageError where the file cannot be opened or written; a full disk only
    delays: what did not fit is kept in memory and written with a later record, at the latest by `close`.
    """

    __slots__ = ("_descriptor", "_metrics", "_pictures", "_unwritten", "counts", "path")

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME
        self.counts: Counter[str] = Counter()
        # The last step of each key says what is known, since steps only ever grow: no set of all steps is needed.
        self._metrics: dict[str, int] = {}
        self._pictures: dict[str, int] = {}
        self._unwritten = bytearray()
        with files.storage("open", self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            self._mend()
            for _, record in read(self.path):
                self._remember(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write the values measured at `step` (optimizer steps done), less those already known."""
        last = self._metrics
        fresh = {key: _number(value) for key, value in values.items() if step > last.get(key, -1)}
        if fresh:
            self._write({"time": _now(), "kind": METRICS, "step": int(step), "values": fresh})

    def picture(self, step: int, key: str, path: str | Path, caption: str = "") -> None:
        """Write that the picture `key` (e.g. "samples/0") of `step` lies at `path`, relative to the folder; nothing where it is known."""
        if step > self._pictures.get(key, -1):
            self._write(
                {
                    "time": _now(),
                    "kind": PICTURE,
                    "step": int(step),
                    "key": key,
                    "path": Path(path).as_posix(),
                    "caption": caption,
                }
            )

    def event(self, kind: str, **fields: Any) -> None:
        """Write that something happened: `kind` in one word ("attempt", "checkpoint", "warning"), `fields` as JSON has them."""
        if kind in (METRICS, PICTURE) or "time" in fields:
            raise ValueError(
                f"{kind!r} with {sorted(fields)} is no event: metrics and pictures have their own methods, the time is added here"
            )
        plain = {key: _number(value) if isinstance(value, float) else value for key, value in fields.items()}
        self._write({"time": _now(), "kind": kind, **plain})

    def records(self, start_offset: int = 0) -> Iterator[dict[str, Any]]:
        """Each record from byte `start_offset` on, oldest first."""
        return (record for _, record in read(self.path, start_offset))

    def close(self) -> None:
        """Wait until all is on the disk, and close; a second call does nothing. Raises errors.StorageError where something could not be written."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            with files.storage("write", self.path):
                while self._unwritten:
                    del self._unwritten[: os.write(descriptor, self._unwritten)]
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _write(self, record: dict[str, Any]) -> None:
        # One write a line and no fsync: what a write has taken is in the kernel's page cache, which outlives a SIGKILL of this process.
        # Only a power cut loses it, and with it at most the steps since the last checkpoint that was synced, which are then done again.
        # An fsync a line would cost more than a small model's step.
        line = (
            json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=str).encode(
                "utf-8", "backslashreplace"
            )
            + b"\n"
        )
        waiting = bool(self._unwritten)
        self._unwritten += line
        with files.storage("write", self.path):
            try:
                while self._unwritten:
                    del self._unwritten[: os.write(self._descriptor, self._unwritten)]
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if not waiting:
                    log.warning(
                        "%s: %s. What happens is kept in memory and written when there is room.",
                        self.path,
                        error.strerror,
                    )
        self._remember(record)

    def _remember(self, record: dict[str, Any]) -> None:
        self.counts[record["kind"]] += 1
        if record["kind"] == METRICS:
            step, last = record["step"], self._metrics
            for key in record["values"]:
                if step > last.get(key, -1):
                    last[key] = step
        elif record["kind"] == PICTURE:
            self._pictures[record["key"]] = max(record["step"], self._pictures.get(record["key"], -1))

    def _mend(self) -> None:
        """End a last line that was torn: with a line break if only that is lacking, else by cutting it off."""
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
    try:
        record = json.loads(line)
        if not isinstance(record["kind"], str) or not isinstance(record["time"], (int, float)):
            return None
        if record["kind"] == METRICS:
            record["step"] = int(record["step"])
            record["values"] = {key: float(value) for key, value in record["values"].items()}
        elif record["kind"] == PICTURE:
            record["step"], record["key"], record["path"] = int(record["step"]), str(record["key"]), str(record["path"])
        return record
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _number(value: float) -> float | str:
    # JSON has no word for these; as text every reader takes them, and float() turns them back.
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _now() -> float:
    return round(time.time(), 3)
