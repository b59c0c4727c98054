"""Text is the text that was typed, on the command line and in files; and paths may begin with ~."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from trainer.__main__ import main
from trainer.config import command_line
from trainer.config.compose import read_run, register
from trainer.config.identity import to_plain
from trainer.config.request import check_sweep, requested_run
from trainer.core.errors import UsageError
from trainer.training.run_folder import find_run_folder

NUMBERS = [
    "1.10",
    "2024_05",
    "146730e92337",
    "1e5",
    "0x10",
    "true",
    "on",
    "nan",
    "007",
    "-0",
    "2024-01-01",
    ".5",
    "1:30",
]
"""Text that Hydra or YAML would turn into something else."""


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    register()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "h"))


def request(*arguments: str):
    parsed = requested_run(command_line.parse(arguments), find_run_folder)
    assert parsed is not None
    return parsed.run


def from_file(text: str | bytes, *arguments: str):
    Path("experiment").mkdir(exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode()
    Path("experiment/mine.yaml").write_bytes(b"# @package _global_\n" + data)
    return request("--config-dir", ".", "experiment=mine", *arguments)


@pytest.mark.parametrize("text", NUMBERS)
def test_text_keeps_its_characters(text: str):
    run = request(f"name={text}", f"sample.prompts=[{text}, x,{text}]", "dataset=csv", f"dataset={{path: {text} }}")
    assert (run.name, run.sample.prompts, run.dataset.path) == (text, [text, "x", text], text)
    run = from_file(f"name: {text}\nsample: {{prompts: [{text}, '{text}']}}\ntracking: {{experiment: {text}}}")
    assert (run.name, run.sample.prompts, run.tracking.experiment) == (text, [text, text], text)
    assert command_line.check_override(f"run={text}", sweep=False).replace("'", "") == f"run={text}"


def test_values_of_dictionaries_and_sweeps_keep_their_characters():
    concepts = ["dataset=concepts", "dataset.path=x"]
    assert request(*concepts, "dataset.triggers={a: 1.10, b: 1}").dataset.triggers == {"a": "1.10", "b": "1"}
    assert request(*concepts, "dataset.repeats.2024_05=2").dataset.repeats == {"2024_05": 2}
    with pytest.raises(UsageError, match="type dataset.repeats.2024_05=VALUE"):
        request(*concepts, "dataset.repeats={2024_05: 2}")
    assert command_line.check_override("name=1.10, 2e5,3", sweep=True) == "name='1.10', '2e5',3"
    assert command_line.check_override("name=choice(1.10,a)", sweep=True) == "name=choice('1.10',a)"
    assert command_line.check_override("optimizer.lr=1e-4,1e-3", sweep=True) == "optimizer.lr=1e-4,1e-3"
    # The numbers of a range have to stay numbers.
    assert command_line.check_override("name=range(1,1.5,0.10)", sweep=True) == "name=range(1,1.5,0.10)"


def test_other_values_of_a_file_have_the_type_of_their_setting():
    run = from_file(
        "defaults: [{override /dataset: csv}, _self_]\nname: null\nsteps: 5\nfresh: on\nema: 9e-1\n"
        "optimizer: {lr: 1e-3, betas: [0.5, 0.9]}\ndataset: {path: x, buckets: [512, 256x128], flip: true}"
    )
    assert (run.name, run.steps, run.fresh, run.ema, run.optimizer.lr) == (None, 5, True, 0.9, 1e-3)
    assert (run.optimizer.betas, run.dataset.buckets, run.dataset.flip) == ([0.5, 0.9], [512, "256x128"], True)
    assert from_file("dataset: {buckets: true}").dataset.buckets is True


def test_settings_of_a_run_are_read_as_they_were_saved(tmp_path: Path):
    run = request(
        "name=1.10", "sample.prompts=[2e5,'null','~']", "dataset=csv", "dataset.path=x", "dataset.buckets=[64]"
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_plain(run), sort_keys=False))
    assert to_plain(read_run(tmp_path / "config.yaml")) == to_plain(run)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.betas=[0.9,null]", "takes a number"),
        ("optimizer.betas=[0.9,x]", "takes a number"),
        ("sample.prompts=[null]", "takes text"),
        ("optimizer.betas=0.9", "type a list such as"),
        ("dataset.triggers=[1]", r"names with values such as \{a: 1"),
        ("name=[1]", "type text"),
        ("export.dtype=half", "one of float32, "),
    ],
)
def test_a_value_of_another_type_is_explained_by_the_type_of_the_setting(override: str, message: str):
    with pytest.raises(UsageError, match=message):
        request("dataset=concepts", override)


@pytest.mark.parametrize("name", ["146730e92337", "2024_05", "007"])
def test_a_run_whose_name_looks_like_a_number_is_found(name: str, tmp_path: Path):
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    saved = request("seed=7")
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(saved), sort_keys=False))
    found = request("stage=evaluate", f"run={name}", "out=runs")
    assert (found.run, found.seed) == (name, 7)


# ~


@pytest.mark.parametrize("key", ["out", "cache.path", "dataset.path"])
def test_home_folder_of_a_path_is_expanded(key: str, tmp_path: Path):
    for run in (
        request("dataset=csv", f"{key}=~/x"),
        from_file(yaml.safe_dump({"defaults": [{"override /dataset": "csv"}, "_self_"], **_nested(key, "~/x")})),
    ):
        value = OmegaConf.select(OmegaConf.structured(run), key)
        assert value == f"{tmp_path}/h/x"


def _nested(key: str, value: str) -> dict:
    group, _, name = key.rpartition(".")
    return {group: {name: value}} if group else {name: value}


def test_home_folder_is_expanded_in_uris_lists_and_sweeps(tmp_path: Path):
    home = f"{tmp_path}/h"
    run = request("tracking.uri=sqlite:///~/x.db", "sample.prompts=[a]", "sample.images=['~/a.png']")
    assert (run.tracking.uri, run.sample.images) == (f"sqlite:///{home}/x.db", [f"{home}/a.png"])
    args = command_line.parse(["-m", "seed=1,2", "out=~/runs"])
    check_sweep(args)
    assert args.overrides[-1] == f'out="{home}/runs"'
    # What is part of a run's identity stays as typed, and is expanded where it is used.
    assert request("method.init_from=~/x").method.init_from == "~/x"
    with pytest.raises(UsageError, match="no home folder of a user nobody-of-this-name"):
        request("method.init_from=~nobody-of-this-name/x")
    (tmp_path / "h/experiment").mkdir(parents=True)
    (tmp_path / "h/experiment/mine.yaml").write_text("# @package _global_\nseed: 7")
    assert request("--config-dir", "~", "experiment=mine").seed == 7


def test_a_saved_sweep_keeps_the_characters_of_text(capfd: pytest.CaptureFixture[str]):
    Path("sweep").mkdir()
    Path("sweep/mine.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {name: '1.10,2e5'}}}"
    )
    assert main(["--config-dir", ".", "sweep=mine", "--cfg", "hydra"]) == 0
    assert yaml.safe_load(capfd.readouterr().out)["hydra"]["sweeper"]["params"] == {"name": "'1.10','2e5'"}
