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
GUIDES = {"adding-a-model": "lumina2", "adding-a-layout": "captions_json", "adding-an-optimizer": "sgd"}
"""Pages about adding an option, each with an option that stands for NAME in its commands."""
MENTIONED_TEST = re.compile(r"(?<![./\w])test_[a-z_]+\b(?!\.py)")


def commands() -> list[str]:
    """The commands `python -m trainer ...` that train, without comments, placeholders and sweeps."""
    text = (ROOT / "README.md").read_text()
    for page, option in GUIDES.items():
        text += (ROOT / "docs" / f"{page}.md").read_text().replace("NAME", option)
    lines = (line.strip() for line in text.splitlines() if line.startswith("    "))
    found = [line.partition(" #")[0].strip() for line in lines if line.startswith("python -m trainer ")]
    left_out = r"[<\[]\w+ ?[=.]|<|\.\.\.| -m \w+[./]| -m \w+=| ui\b|--help|--cfg|sweep="
    return [line for line in found if not re.search(left_out, line)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_mentioned_files_exist(document: Path):
    paths = {match[1] for match in MENTIONED_PATH.finditer(document.read_text()) if "NAME" not in match[1]}
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", GUIDES)
def test_mentioned_tests_exist(page: str):
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = {*MENTIONED_TEST.findall((ROOT / "docs" / f"{page}.md").read_text())}
    assert names
    # A name may be cut short.
    assert [name for name in sorted(names) if f"def {name}" not in tests] == []


def test_the_documentation_has_commands():
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_commands_compose(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command)[3:], "--cfg", "job"]) == 0
    assert "max_grad_norm" in capsys.readouterr().out
