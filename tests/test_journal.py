"""Tests of the journal: with real files, kills and full disks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.core import errors
from trainer.tracking.curves import read_series
from trainer.tracking.journal import Journal, read_records

ROOT = Path(__file__).resolve().parents[1]


def test_journal_returns_written_records(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.log_event("attempt", number=1, device="cpu", loss=float("nan"), folder=Path("a/b"))
        journal.log_metrics(1, {"train/loss": 0.1, "train/lr": 1e-4})
        journal.log_metrics(2, {"train/loss": float("nan"), "train/lr": float("inf"), "train/grad_norm": float("-inf")})
        journal.log_image(2, "samples/0", "pictures/step-00000002/0.png", "a \ud800 house\n\u2028 ü")
        attempt, first, second, image = journal.records()
    assert attempt["kind"] == "attempt" and attempt["loss"] == "NaN" and attempt["folder"] == "a/b"
    assert first["step"] == 1 and first["values"] == {"train/loss": 0.1, "train/lr": 1e-4}
    assert repr(second["values"]) == "{'train/loss': nan, 'train/lr': inf, 'train/grad_norm': -inf}"
    assert image["key"] == "samples/0" and image["path"] == "pictures/step-00000002/0.png"
    assert "house\n" in image["caption"]


def test_journal_is_strict_json_with_one_record_per_line(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.log_metrics(1, {"train/loss": float("nan")})
        journal.log_image(1, "samples/0", "0.png", "two\nlines")
    *lines, last = (tmp_path / "journal.jsonl").read_text().split("\n")
    assert len(lines) == 2 and last == ""
    for line in lines:
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_repeated_steps_after_resume_are_not_written_again(tmp_path: Path):
    with Journal(tmp_path) as journal:
        for step in range(1, 11):
            journal.log_metrics(step, {"train/loss": step / 10})
        journal.log_image(10, "samples/0", "0.png")
    with Journal(tmp_path) as journal:
        for step in range(6, 16):
            journal.log_metrics(step, {"train/loss": step / 10})
            if step == 10:
                # As if the first process had been killed between val/loss and samples/1.
                journal.log_metrics(step, {"train/loss": 99.0, "val/loss": 1.0})
                journal.log_image(step, "samples/0", "0.png")
                journal.log_image(step, "samples/1", "1.png")
        assert journal.counts == {"metrics": 16, "picture": 2}
    metrics = read_series(tmp_path)
    assert list(metrics["train/loss"][0]) == list(range(1, 16))
    assert list(metrics["train/loss"][1]) == [step / 10 for step in range(1, 16)]
    assert list(metrics["val/loss"][0]) == [10]


@pytest.mark.parametrize(
    "torn", [b'{"time":1.5,"kind":"metr', b"\0\0\0\0", b'{"time":1.5,"kind":"event"}', b"12", b"x" * 200_000]
)
def test_torn_last_line_damages_no_other_record(tmp_path: Path, torn: bytes):
    with Journal(tmp_path) as journal:
        journal.log_metrics(1, {"train/loss": 1.0})
        path = journal.path
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(torn)
    assert [offset for offset, _ in read_records(path)] == [size]
    with Journal(tmp_path) as journal:
        journal.log_metrics(2, {"train/loss": 2.0})
    assert list(read_series(tmp_path)["train/loss"][0]) == [1, 2]
    assert path.read_bytes().count(b"\n") == (3 if torn.endswith(b"}") else 2)


def test_journal_continues_after_writer_is_killed(tmp_path: Path):
    program = (
        "import sys, pathlib; from trainer.tracking.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1])); print(flush=True)\n"
        "for step in range(1, 10**9): journal.log_metrics(step, {'train/loss': step / 3, 'train/lr': 1e-4})"
    )
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.03)
        process.kill()
        process.wait()
    steps = list(read_series(tmp_path)["train/loss"][0])
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 100


def test_full_disk_delays_records_and_is_an_error_only_at_the_end(tmp_path: Path):
    program = (
        "import os, pathlib, resource, sys; from trainer.tracking.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1])); limit = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))\n"
        "for step in range(1, 50): journal.log_metrics(step, {'train/loss': step})\n"
        "assert journal.path.stat().st_size == 500\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, limit)\n"
        "journal.log_metrics(50, {'train/loss': 50})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))\n"
        "journal.log_metrics(51, {'train/loss': 51})\n"
        "journal.close()"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.count("File too large. Records are kept in memory") == 2
    assert "errors.StorageError" in result.stderr and "Raise the limit" in result.stderr
    assert list(read_series(tmp_path)["train/loss"][0]) == list(range(1, 51))


def test_missing_folder_is_a_storage_error(tmp_path: Path):
    with pytest.raises(errors.StorageError, match=r"Could not open .*journal\.jsonl"):
        Journal(tmp_path / "missing")


def test_writing_a_line_takes_less_than_100_microseconds(tmp_path: Path):
    values = {f"train/{number}": number / 7 for number in range(10)}
    with Journal(tmp_path) as journal:
        seconds = []
        for block in range(20):
            begin = time.perf_counter()
            for step in range(100):
                journal.log_metrics(block * 100 + step, values)
            seconds.append((time.perf_counter() - begin) / 100)
    assert min(seconds) < 100e-6
