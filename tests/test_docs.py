"""The documentation names files that exist and commands that compose."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from trainer.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "launch" / "README.md",
]
MENTIONED_PATH = re.compile(r"(?<![\w/.<])((?:trainer|conf|tests|bench|launch|docs|hydra_plugins)/[\w./-]*\w)")


def commands() -> list[str]:
    """The commands `python -m trainer ...` of the README that train, without comments, placeholders and sweeps."""
    lines = (line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    "))
    found = [line.partition(" #")[0].strip() for line in lines if line.startswith("python -m trainer ")]
    left_out = r"[<\[]\w+ ?[=.]|<|\.\.\.| -m \w+[./]| -m \w+=| ui\b|--help|--cfg|sweep="
    return [line for line in found if not re.search(left_out, line)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_mentioned_files_exist(document: Path):
    paths = {match[1] for match in MENTIONED_PATH.finditer(document.read_text()) if "NAME" not in match[1]}
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_readme_has_commands():
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_readme_compose(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command)[3:], "--cfg", "job"]) == 0
    assert "max_grad_norm" in capsys.readouterr().out
