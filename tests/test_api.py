"""The Python API and the notebook: same results and refusals as the command line, several runs in one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from program import fingerprint

import trainer
from trainer.__main__ import main
from trainer.config import command_line
from trainer.config.compose import compose_config
from trainer.config.request import requested_run
from trainer.core.signals import Signals
from trainer.training.run_folder import find_run_folder

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwx"
SMALL = ["dataset.pairs=4", "dataset.held_out=1", "batch=2", "evaluation.images=1", "sample.steps=1", "tracking=none"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of short runs that share a cache. `out` is still missing."""
    return [*SMALL, "hardware=cpu", f"cache.path={tmp_path_factory.mktemp('cache')}"]


@pytest.fixture(scope="module")
def result(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> trainer.TrainingResult:
    return trainer.train([*settings, "steps=2", f"out={tmp_path_factory.mktemp('runs')}"])


# Results


def test_training_gives_the_same_run_as_the_command_line(
    result: trainer.TrainingResult, settings: list[str], tmp_path: Path
):
    assert main([*settings, "steps=2", f"out={tmp_path}"]) == 0
    assert fingerprint(result.folder) == fingerprint(tmp_path / result.id)
    summary = json.loads((tmp_path / result.id / "summary.json").read_text())
    assert (result.last_loss, result.best_loss) == (summary["last_val_loss"], summary["best_val_loss"])
    assert result.steps == 2 and result.psnr == summary["final"]["val/psnr"]
    assert [path.name for path in result.images] == ["1-strip.png"]
    assert [path.name for path in result.exports] == ["pytorch_lora_weights.safetensors"]
    assert all(path.is_file() for path in (*result.images, *result.exports))


def test_finished_run_is_returned_at_once(result: trainer.TrainingResult, settings: list[str]):
    before = sorted((path, path.stat().st_mtime_ns) for path in result.folder.rglob("*.*"))
    assert trainer.train([*settings, "steps=2", f"out={result.folder.parent}"]) == result
    assert sorted((path, path.stat().st_mtime_ns) for path in result.folder.rglob("*.*")) == before


def test_sampling_takes_prompts_as_written(result: trainer.TrainingResult):
    prompts = ['make it "night", ${seed} [a] it\'s \\ \\" é', "null"]
    samples = trainer.sample(["hardware=cpu"], run=result, prompts=prompts, images=result.images[0])
    assert samples.captions == prompts
    assert [path.name for path in samples.images] == ["00000.png", "00001.png"]
    assert all(path.is_file() for path in samples.images)
    request = json.loads((samples.folder / "request.json").read_text())
    assert request["sample"]["prompts"] == prompts


def test_evaluation_measures_the_best_weights(result: trainer.TrainingResult):
    overrides = [f"run={result.id}", f"out={result.folder.parent}"]
    evaluation = trainer.evaluate(overrides)
    assert evaluation.loss == evaluation.metrics["val/loss"] == result.best_loss
    assert evaluation.before_training["val/loss"] != evaluation.loss
    assert evaluation.id == result.id and evaluation.step in (1, 2)
    assert evaluation.images and all(path.is_file() for path in evaluation.images)


# Interruptions and threads


def test_ctrl_c_saves_raises_keyboard_interrupt_and_restores_the_handlers(settings: list[str], tmp_path: Path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupt() -> None:
        """Interrupts after the first step."""
        while not any('"train/loss"' in path.read_text() for path in tmp_path.glob("*/journal.jsonl")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="stopped by Ctrl-C"):
        trainer.train([*settings, "steps=500", f"out={tmp_path}"])
    thread.join()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    summary = json.loads(next(tmp_path.glob("*/summary.json")).read_text())
    assert summary["status"] == "stopped" and 1 <= summary["steps"] < 500
    assert [int(path.name[5:]) for path in tmp_path.glob("*/checkpoints/step-*")][-1:] == [summary["steps"]]


def test_second_interruption_does_not_end_a_process_that_is_not_the_programs():
    with Signals(exits=False) as signals, pytest.raises(trainer.errors.Interrupted), signals.recorded():
        signal.raise_signal(signal.SIGINT)
        assert signals.seen == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal was deferred")


def test_runs_outside_the_main_thread(result: trainer.TrainingResult, settings: list[str], tmp_path: Path):
    results: list[trainer.TrainingResult] = []
    overrides = [*settings, "steps=2", f"out={tmp_path}", "hardware.workers=1"]
    thread = threading.Thread(target=lambda: results.append(trainer.train(overrides)))
    thread.start()
    thread.join()
    assert fingerprint(results[0].folder) == fingerprint(result.folder)


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=1"], r"did you mean optimizer\.lr\?"),
        (["model._target_=os.mkdir"], "cannot load objects by name"),
        (["hydra.run.dir=trace"], "settings of Hydra itself cannot be changed"),
        ([f"name={TOKEN}"], "access token"),
        (["method=full", "method.rank=4"], "method has only init_from"),
        (["stage=check"], r"trainer\.train\(\) sets the stage"),
        (["--cfg", "job"], "flags belong to the command line"),
        (["seed=1,2"], r"several values are a sweep"),
        (["sweep=lr_x_rank"], r"call trainer\.train\(\) in a loop"),
        (["hydra.mode=MULTIRUN"], r"call trainer\.train\(\) in a loop"),
        ("steps=20", "a list of strings"),
        ([20], "a list of strings"),
    ],
)
def test_mistakes_raise_usage_errors(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(trainer.errors.UsageError, match=message) as caught:
        trainer.train(overrides)
    assert TOKEN not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_those_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(trainer.errors.DataError, match=r"dataset\.path=nowhere: there is no such folder"):
        trainer.train(["dataset=imagefolder", "dataset.path=nowhere"])
    with pytest.raises(trainer.errors.UsageError, match="neither nope nor runs/nope is a run folder"):
        trainer.evaluate(run="nope")
    with pytest.raises(trainer.errors.UsageError, match="works on an existing run"):
        trainer.sample()
    with pytest.raises(trainer.errors.UsageError, match=r"type a list"):
        trainer.sample(["sample.prompts=night"], run="nope")


def test_errors_contain_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "nowhere")
    monkeypatch.setenv("OTHER_TOKEN", "of-no-known-form")
    (tmp_path / "of-no-known-form").mkdir()
    monkeypatch.chdir(tmp_path / "of-no-known-form")
    with pytest.raises(trainer.errors.DataError) as caught:
        trainer.train(["dataset=imagefolder", "dataset.path=${oc.env:PWD,.}/missing", "out=runs"])
    assert "of-no-known-form" not in str(caught.value)


def test_missing_package_is_an_installation_error():
    """`-S` leaves out the packages of this environment."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import trainer\n"
        "try: trainer.train()\n"
        "except trainer.errors.InstallationError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert re.match(r"The Python package \w+, which trainer needs, is not installed", done.stdout), done.stderr


# Composition


def test_user_files_and_interpolations_compose_as_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "it's mine, [1] ${x}"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\nmethod: {rank: 77}\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["experiment=mine", "out=${hydra:runtime.cwd}/a", "name=${seed}", "hydra.mode=RUN", "seed=3"]
    request = requested_run(command_line.parse(["--config-dir", str(folder), *arguments]), find_run_folder)
    assert request is not None
    assert request.run.method.rank == 77
    assert (request.run.out, request.run.name) == (f"{tmp_path}/a", "3")
    assert request.overrides == ["experiment=mine", "out=${hydra:runtime.cwd}/a", "name=${seed}", "seed=3"]


def test_composing_leaves_the_hydra_of_the_caller_as_it_was(tmp_path: Path):
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    (tmp_path / "own.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        before = HydraConfig.instance().cfg
        with pytest.raises(trainer.errors.UsageError):
            trainer.train(["batch=0"])
        assert GlobalHydra.instance().is_initialized()
        assert hydra.compose("own") == {"a": 1}
        assert HydraConfig.instance().cfg is before


@pytest.mark.parametrize(
    "text", ["", "a", 'a"b', "it's", "\\", 'a\\"', "${seed}", "a, b", "[x]", "1e5", "null", "é\n~"]
)
def test_override_of_a_python_value_sets_exactly_these_characters(text: str):
    overrides = [command_line.to_override("name", text), command_line.to_override("sample.prompts", [text, text])]
    config = compose_config(command_line.parse(overrides).overrides)
    assert (config.name, list(config.sample.prompts)) == (text, [text, text])


def test_importing_the_package_imports_neither_hydra_nor_torch():
    code = "import sys, trainer; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    imported = set(done.stdout.split())
    assert "trainer" in imported
    assert imported & {"hydra", "omegaconf", "torch", "numpy", "yaml", "tqdm", "argparse"} == set()


# The notebook


def code_cells() -> list[str]:
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebook_composes():
    """The quick part of the test below: every list of overrides in the notebook names settings that exist."""
    namespace: dict[str, list[str]] = {}
    (text,) = (found[0] for cell in code_cells() if (found := re.search(r"^settings = \[.*?^\]", cell, re.M | re.S)))
    exec(text, namespace)
    assert requested_run(command_line.parse(namespace["settings"]), find_run_folder) is not None


@pytest.mark.slow
def test_cells_of_the_notebook_run_in_order(tmp_path: Path):
    """In a process of their own, as in a kernel, but without IPython, which is not installed."""
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(code_cells()))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"rank 16: held-out loss \d", done.stdout)
    assert "did you mean optimizer.lr?" in done.stdout
    shutil.rmtree(tmp_path / "notebook_runs")
