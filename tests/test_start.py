"""How the program starts: what it imports, and when Python collects garbage."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.core import garbage
from trainer.core.libraries import hidden_scipy

NOT_NEEDED = {"scipy", "sklearn", "pandas", "mlflow", "datasets", "bitsandbytes", "torchvision", "matplotlib"}
"""Libraries that are installed, or that users often have, and that encoding images and captions does not need."""


def test_encoding_imports_no_library_that_it_does_not_need(tmp_path: Path):
    """`-X importtime` prints a line for each imported module, and one for a library that is hidden and imported."""
    command = [sys.executable, "-X", "importtime", "-m", "trainer", "stage=cache", "tracking=none", f"out={tmp_path}"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    modules = [line.rpartition("|")[2].strip() for line in lines]
    imported = {name.partition(".")[0] for name in modules if "." in name}
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"torch", "diffusers", "transformers"} <= imported
    assert imported & NOT_NEEDED == set()


def test_scipy_is_hidden_only_inside_and_only_if_it_was_not_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    with hidden_scipy(), pytest.raises(ModuleNotFoundError):
        importlib.import_module("scipy")
    scipy = importlib.import_module("scipy")
    with hidden_scipy():
        assert importlib.import_module("scipy") is scipy
    assert importlib.import_module("scipy") is scipy


def test_garbage_is_collected_as_usual_once_the_program_has_started():
    usual = gc.get_threshold()
    garbage.collect_as_usual()
    assert gc.get_threshold() == usual
    garbage.collect_seldom()
    assert gc.get_threshold()[0] > 10 * usual[0]
    garbage.collect_as_usual()
    assert gc.get_threshold() == usual
