"""Yaml files of --config-dir that come from somebody else: none of their code runs, whatever they name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from trainer.__main__ import main

MODULE = "module_of_a_recipe"
GLOBAL = "# @package _global_\n"
OBJECT = f"{{_target_: {MODULE}.Anything}}"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
HOSTILE: dict[str, tuple[dict[str, str], str]] = {
    "callback": ({"": f"hydra: {{callbacks: {{x: {OBJECT}}}}}"}, "cannot load objects by name"),
    "callback in the header": ({"": f"# @package hydra.callbacks.x\nk: {MODULE}.Anything"}, "part of Hydra's own"),
    "callback in a file": (
        {"": "defaults: [{/hydra/callbacks: x}, _self_]", "hydra/callbacks/x": f"x: {OBJECT}"},
        "defaults list contains /hydra/callbacks",
    ),
    "log handler": (
        {"": f"hydra: {{job_logging: {{handlers: {{x: {{class: {MODULE}.Handler}}}}}}}}"},
        r"hydra\.job_logging: settings of Hydra itself cannot be changed",
    ),
    "log handler of a sweep": (
        {"": f"hydra: {{hydra_logging: {{formatters: {{x: {{'()': {MODULE}.Formatter}}}}}}}}"},
        r"hydra\.hydra_logging: settings of Hydra itself cannot be changed",
    ),
    "sweeper": ({"": f"hydra: {{sweeper: {OBJECT}}}"}, "cannot load objects by name"),
    "launcher": ({"": f"hydra: {{launcher: {OBJECT}}}"}, "cannot load objects by name"),
    "sweeper in a file": (
        {"": "defaults: [{override /hydra/sweeper: mine}, _self_]", "hydra/sweeper/mine": f"x: {OBJECT}"},
        "hydra/sweeper/mine: settings of Hydra itself cannot be changed; remove the file",
    ),
    "interpolated key": (
        {"": "hydra: {launcher: \"${oc.create:{_tar${oc.env:NO,''}get_: os.mkdir}}\"}"},
        r"hydra\.launcher: settings of Hydra itself cannot be changed",
    ),
    "search path": (
        {"": f"hydra: {{searchpath: ['pkg://{MODULE}']}}"},
        r"hydra\.searchpath: settings of Hydra itself cannot be changed",
    ),
    "itself": ({"": "defaults: [mine, _self_]"}, "names itself"),
    "itself through another": (
        {"": "defaults: [other, _self_]", "experiment/other": f"{GLOBAL}defaults: [mine, _self_]"},
        "names itself",
    ),
    "alias bomb": ({"": BOMB}, "more than 100000 values"),
    "deep nesting": ({"": f"name: {'[' * 5000}{']' * 5000}"}, "nested too deeply|nesting depth"),
}
"""File (empty: the recipe itself) -> text, and the message."""


@pytest.mark.parametrize("flags", [[], ["--multirun", "seed=1,2"]], ids=["run", "sweep"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_recipe_that_would_run_code_or_never_end_is_refused(
    name: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    files, message = HOSTILE[name]
    (tmp_path / f"{MODULE}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    for file, text in files.items():
        path = tmp_path / f"{file or 'experiment/mine'}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if file or text.startswith("#") else GLOBAL + text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["--config-dir", ".", "experiment=mine", *flags]) == 64
    output = capfd.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1
    assert re.search(message, output.err)
    assert MODULE not in sys.modules and sorted(tmp_path.iterdir()) == before
