"""Tests of the table, summary and plots that are made from the journal."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from trainer.tracking import curves
from trainer.tracking.journal import Journal


def write_journal(folder: Path) -> None:
    with Journal(folder) as journal:
        journal.log_event("attempt", number=1)
        for step in range(1, 101):
            values = {"train/loss": 30 / step, "train/lr": 1e-3, "train/grad_norm": float("inf") if step == 7 else 1.0}
            values |= {"perf/steps_per_second": 9.5, "system/memory_gib": 1.0, "system/device_memory_gib": 2.0}
            journal.log_metrics(step, values)
            if step % 25 == 0:
                journal.log_metrics(step, {"val/loss": abs(step - 75) + 0.5, "val/psnr": step / 4})


def test_empty_journal_gives_empty_curves_table_and_summary(tmp_path: Path):
    assert curves.draw_curves(tmp_path).exists()
    assert curves.write_metrics_csv(tmp_path).read_text() == "step\n"
    summary = json.loads(curves.write_summary(tmp_path, {"status": "failed"}).read_text())
    assert summary["status"] == "failed" and summary["steps"] == 0 and summary["best"] == {}


def test_table_has_sorted_columns_and_one_row_per_step(tmp_path: Path):
    write_journal(tmp_path)
    rows = list(csv.DictReader(curves.write_metrics_csv(tmp_path).read_text().splitlines()))
    first, *names = rows[0]
    assert first == "step" and names == sorted(names)
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 101)]
    assert rows[6]["train/grad_norm"] == "inf" and rows[6]["val/loss"] == "" and float(rows[74]["val/loss"]) == 0.5


def test_summary_has_final_and_best_values(tmp_path: Path):
    write_journal(tmp_path)
    summary = json.loads(curves.write_summary(tmp_path, {"status": "finished", "steps": 100}).read_text())
    assert summary["best"]["val/loss"] == {"value": 0.5, "step": 75}
    assert summary["best"]["val/psnr"] == {"value": 25.0, "step": 100}
    assert summary["final"]["train/loss"] == 0.3 and summary["attempts"] == 1 and summary["status"] == "finished"


def test_curves_are_drawn_without_pyplot(tmp_path: Path):
    write_journal(tmp_path)
    before = set(sys.modules)
    image = curves.draw_curves(tmp_path, "a title").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 20_000
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_smoothing_keeps_length_and_does_not_lag():
    falling = [1000.0 - step for step in range(1000)]
    assert curves.smooth_values([]) == [] and curves.smooth_values([3.0]) == [3.0]
    smooth = curves.smooth_values(falling)
    assert len(smooth) == 1000 and smooth[25:-25] == falling[25:-25]


def test_heat_map_accepts_missing_values(tmp_path: Path):
    axes = ("rank", [4.0, 16.0]), ("lr", [1e-4, 1e-3])
    nan = float("nan")
    image = curves.draw_heat_map(tmp_path / "map.png", "loss", *axes, [[0.2, nan], [0.1, 0.3]])
    assert image.read_bytes().startswith(b"\x89PNG")
    assert curves.draw_heat_map(tmp_path / "empty.png", "loss", *axes, [[nan, nan], [nan, nan]]).exists()
