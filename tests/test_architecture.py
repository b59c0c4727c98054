"""The house stays as it was drawn: who imports whom, one door for each library, nothing heavy before a run begins."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer import config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trainer"
FOUNDATIONS = {"errors", "files", "libraries", "processes", "rows", "secret", "shards", "signals", "streams"}
ROOMS = {*config.GROUPS, "objective"}
MAY_ALSO_IMPORT = {
    **dict.fromkeys(FOUNDATIONS | ROOMS | {"cache", "checkpoint", "loop", "sample"}, frozenset()),
    "model": {"objective", "dataset"},
    "cache": {"dataset"},
    "sample": {"objective"},
    "evaluation": {"objective"},
    "config": ROOMS | {"cache", "checkpoint", "export", "sample"},
    "command_line": {"config"},
    "__main__": {"command_line", "config", "place", "run"},
}
"""Beside the foundations and what lies in the same room."""
STORY = {"run", "finished"}
"""They know everybody; all else is machinery, which knows all but them and the door."""
DOORS = {
    "hydra": {"config", "command_line", "__main__"},
    "omegaconf": {"config", "command_line", "__main__"},
    "mlflow": {"tracking", "sweep"},
    "matplotlib": {"tracking"},
    "peft": {"method"},
    "diffusers": {"model"},
    "transformers": {"model"},
    "PIL": {"dataset"},
    "datasets": {"dataset"},
    "bitsandbytes": {"libraries", "optimizer", "precision"},
    "prodigyopt": {"optimizer"},
    "torchao": {"precision"},
    "torchmetrics": {"evaluation"},
    "accelerate": {"model", "processes"},
}
HEAVY = {
    "numpy",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "mlflow",
    "peft",
    "PIL",
    "matplotlib",
    "accelerate",
    "datasets",
    "pandas",
}
FAMILIES = re.compile(r"flux|kontext|qwen|sdxl|sd15|stable.?diffusion|\bpmg\b", re.IGNORECASE)
MACHINE = re.compile(r"(?<![\w.:/])/(?:home|Users|root|work|mnt|opt|private|scratch)/\w+")
"""A folder of somebody's machine."""


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """`trainer/model/flux.py` -> model, `trainer/run.py` -> run."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions too; what only types are checked with makes no dependency."""
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def refused(path: Path, imported: str) -> bool:
    """Whether a file may not import this dotted name of the package."""
    room, target = room_of(path), imported.split(".")[1]
    if target in FOUNDATIONS | {room, "__version__"}:
        return False
    if room in MAY_ALSO_IMPORT:
        return target not in MAY_ALSO_IMPORT[room]
    return target in {"__main__", "command_line"} or (room not in STORY and target in STORY)


def test_imports_point_from_the_story_to_the_rooms_to_the_foundations_only():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        for name in imports(path)
        if name.startswith("trainer.") and refused(path, name)
    ]
    assert wrong == []


def test_each_outside_library_has_one_door():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        for name in imports(path)
        if room_of(path) not in DOORS.get(name.split(".")[0], {room_of(path)})
    ]
    assert wrong == []


def test_every_group_of_conf_has_its_room_and_every_option_its_settings():
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert groups - {"experiment", "sweep", "hydra"} == set(config.GROUPS)
    for room, options in config.GROUPS.items():
        shipped = {path.stem for path in (ROOT / "conf" / room).glob("*.yaml")}
        # A family may come in several sizes; elsewhere an option is a name in the room too.
        assert shipped if room == "model" else shipped == set(options), room


def test_no_familys_name_stands_outside_the_model_room():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        if room_of(path) != "model"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FAMILIES.search(line)
    ]
    assert wrong == []


def test_no_file_names_a_folder_of_somebodys_machine():
    folders = [ROOT / name for name in ("trainer", "conf", "tests", "docs", "launch", "bench")]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    files += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".txt"} or path.name == "Makefile"]
    wrong = []
    for path in files:
        text = path.read_bytes()
        if b"\0" not in text:
            wrong += [f"{path.relative_to(ROOT)}: {found[0]}" for found in MACHINE.finditer(text.decode())]
    assert wrong == []


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help"]])
def test_composing_imports_nothing_heavy(flags: list[str], tmp_path: Path):
    """`-X importtime` prints a line for every module as it is imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trainer", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    imported = {
        line.rpartition("|")[2].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert done.returncode == 0 and "max_grad_norm" in done.stdout
    assert {"hydra", "trainer"} <= imported
    assert imported & HEAVY == set()
    assert list(tmp_path.iterdir()) == []
