"""The command line: refusals before Hydra imports or writes anything, help, tab completion and exit codes."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.__main__ import main
from trainer.config.groups import GROUPS
from trainer.core import errors, redaction

PROGRAM = [sys.executable, "-m", "trainer"]
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwx"
CANARY = "canary_that_must_not_be_imported"


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with a module and a pickle that create the folder `trace` when they are loaded."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"{CANARY}.py").write_text("import os; os.mkdir('trace')\n")
    (folder / "hostile.yaml").write_text("# @package hydra.callbacks.x\n_target_: os.mkdir\npath: trace\n")
    (folder / "hostile.pickle").write_bytes(pickle.dumps(Hostile()))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)


class Hostile:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("trace",)


def refusal(arguments: list[str], capfd: pytest.CaptureFixture[str], code: int = 64) -> str:
    """Returns the message for a refused command line. Checks that it has one line and that nothing else happens."""
    before = sorted(Path().iterdir())
    assert main(arguments) == code
    output = capfd.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1, output.err
    assert sorted(Path().iterdir()) == before
    assert CANARY not in sys.modules
    return output.err


# Mistakes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model=nope", r"model=nope: .*type one of \w+, "),
        ("experiment=nope", "no such option; type one of .*mini_base"),
        ("optimizer.lrr=1", r"optimizer\.lrr: .*did you mean optimizer\.lr\?"),
        ("+optimizer.lrr=1", r"did you mean optimizer\.lr\?"),
        ("foo=1", "foo: there is no such setting"),
        ("foo/bar=1", "no such group"),
        ("schema=run", "no such group"),
        ("method=full method.rank=4", "method has only init_from"),
        ("optimizer.lr=abc", r"^optimizer\.lr=abc: type a number such as"),
        ("batch=2.5", "batch=2.5: type a whole number"),
        ("seed=null", "seed=null: type a value, not null"),
        ("fresh=maybe", "type true or false"),
        ("stage=nope", "type one of train, check, "),
        ("optimizer.betas=0.9", r"type a list such as \[a,b\]"),
        ("save=5", "one of the settings in it"),
        ("dataset.resolution=[32,64] dataset.resolution={32:1,64:2}", "type dataset.resolution=null before"),
        ("dataset.resolution={32:1,64:2} dataset.resolution=[32,64]", "type dataset.resolution=null before"),
        ("batch=0", "type batch=1"),
        ("optimizer=null", "a run has one optimizer; type optimizer=OPTION, one of "),
        ("~optimizer", "a run has one optimizer"),
        ("~seed", "settings cannot be removed"),
        ("+method=lora", r"type it without \+"),
        ("seed=1,2", r"--multirun .*seed=\[1,2\]"),
        ("name=[a", "cannot be parsed; type group=option or key=value"),
        ("help", "cannot be parsed; type group=option or key=value"),
        ("=", "cannot be parsed; type group=option or key=value"),
        ("name=${nowhere}", "name: .*nowhere"),
        ("dataset=/pictures", r"type dataset\.path=/pictures"),
        ("model=owner/name", r"type model\.path=owner/name"),
        ("run=a", "resume=a"),
        ("resume=a", "neither a nor"),
        ("--nope", "--nope"),
        ("--cfg", "--help shows what can be typed"),
        ("--cfg nope", "'job'"),
        ("--cfg job --multirun", "only one of"),
        ("--config-dir nowhere", "no such folder"),
        ("--config-path nowhere", "--config-dir FOLDER"),
        ("--config-name other", "--config-dir FOLDER"),
        ("-sc", "install=bash"),
        ("experiment=[null]", r"type experiment=NAME, .*experiment=\[\] for none"),
        ("sweep=[[lr_x_rank]]", "type sweep=NAME"),
        ("experiment=null,smoke --multirun", r"experiment=\[\] for none"),
        ("model=1", "an option is a name"),
        ("method=lora,null --multirun", "an option is a name"),
        ("model={a:1}", r"model\.a: there is no such setting"),
        ("+sweep=lr_x_rank", r"type it without \+"),
        ("+hydra.sweeper.params.hydra.callbacks=x", "--multirun optimizer.lr="),
        ("hydra.launcher.slots=2", "slots=2: .*type --multirun as well"),
        ("hydra/launcher=basic", "type --multirun as well"),
        ("hydra.launcher.slots=0 --multirun", "type a whole number above 0"),
        ("hydra.sweeper.max_batch_size=0 --multirun", "type a whole number above 0"),
        ("seed=range(1,2,0) --multirun", "cannot compose .*must not be zero"),
        ("check", "type python -m trainer stage=check"),
        ("seed=1 ui", r"type python -m trainer ui"),
        ("x" * 300 + "=1", "more characters than a file name"),
        ("experiment=" + "x" * 300, "there is no such option"),
        ("ui --nope", "--nope; type for example python -m trainer ui --out FOLDER"),
    ],
)
def test_mistake_is_refused_in_one_line_with_what_to_type(line: str, message: str, capfd: pytest.CaptureFixture[str]):
    assert re.search(message, refusal(line.split(), capfd))


def test_missing_dataset_folder_is_a_data_error(capfd: pytest.CaptureFixture[str]):
    assert main(["dataset=imagefolder", "dataset.path=nowhere", "stage=check"]) == 65
    assert "dataset.path=nowhere: there is no such folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "# @package _global_\noptimizer: {lrr: 1}\n",
            r"experiment/mine\.yaml: optimizer\.lrr: .*did you mean optimizer\.lr\?",
        ),
        ("# @package _global_\noptimizer: {lr: fast}\n", r"experiment/mine\.yaml: optimizer\.lr takes a number"),
        ("optimizer: {lr: 1}\n", r"experiment/mine\.yaml: its first line must be # @package _global_"),
        ("# @package _global_\noptimizer: [\n", r"mine\.yaml.*line 3"),
        ("# @package _global_\nmethod: {_target_: os.mkdir, path: trace}\n", "cannot load objects by name"),
        (f"# @package _global_\nname: {TOKEN}\n", "name holds an access token"),
        ("# @package _global_\ndefaults: [mine, _self_]\n", "experiment=mine selects names itself"),
        ("# @package _global_\ndefaults: [null]\n", "experiment=mine selects has a form that Hydra cannot compose"),
        ("# @package _global_\nhydra: {mode: MULTIRUN, launcher: {slots: two}}\n", "slots=two must be a whole number"),
    ],
)
def test_mistake_in_a_user_file_is_refused_with_the_file_name(
    text: str, message: str, capfd: pytest.CaptureFixture[str]
):
    Path("experiment").mkdir()
    Path("experiment/mine.yaml").write_text(text)
    error = refusal(["--config-dir", ".", "experiment=mine"], capfd)
    assert re.search(message, error) and TOKEN not in error


def test_user_files_add_options_to_the_included_ones(capfd: pytest.CaptureFixture[str]):
    Path("experiment").mkdir()
    Path("experiment/mine.yaml").write_text("# @package _global_\nmethod: {rank: 77}\n")
    assert main(["--config-dir", ".", "experiment=mine", "--cfg", "job"]) == 0
    assert "rank: 77" in capfd.readouterr().out
    assert main(["--config-dir", ".", "--help"]) == 0
    assert re.search(r"experiment +.*\bmine, mini_base\b", capfd.readouterr().out)


# What must not reach Hydra


@pytest.mark.parametrize(
    "arguments",
    [
        ["+hydra.callbacks.x._target_=os.mkdir", "+hydra.callbacks.x.path=trace"],
        ["++hydra.callbacks.x._target_=os.mkdir"],
        ["+hydra.callbacks={x: {_target_: os.mkdir, path: trace}}"],
        ["hydra.callbacks={}"],
        ["+hydra.callbacks.x=${oc.create:${oc.decode:'{_tar${oc.env:NO,\"\"}get_: os.mkdir, path: trace}'}}"],
        ["hydra/callbacks=hostile"],
        ["+hydra/callbacks=../../../hostile"],
        ["hydra=hostile"],
        ["hydra.launcher._target_=os.mkdir", "--multirun"],
        ["hydra.launcher={_target_: os.mkdir}", "--multirun"],
        ["hydra.sweeper=${oc.decode:'{a: b}'}", "--multirun"],
        ["hydra.sweeper.params=${oc.decode:'{a: b}'}", "--multirun"],
        ["hydra/job_logging=default"],
        ["hydra/hydra_logging=default"],
        ["hydra.job_logging.handlers.x.class=logging.FileHandler"],
        ["hydra.run.dir=trace"],
        ["hydra.output_subdir=trace"],
        ["hydra.job.chdir=true"],
        ["+hydra.job.env_set.PATH=nowhere"],
        [f"hydra.searchpath=[pkg://{CANARY}]"],
        ["hydra.searchpath=[file://.]", "+experiment=hostile"],
        ["~hydra.callbacks"],
        ["+model@hydra.callbacks.x=mini_kontext"],
        ["+experiment@hydra.launcher=mini_base"],
        ["model@_global_=mini_kontext"],
        ["model._target_=os.mkdir"],
        ["+model._target_=os.mkdir"],
        ["+_target_=os.mkdir"],
        ["name={_target_: os.mkdir, path: trace}"],
        ["evaluation.prompts=[{_target_: os.mkdir}]"],
        ["+model.suggested.learning_rate={_target_: os.mkdir}"],
        ["model=../../hostile"],
        ["+experiment=../hostile"],
        ["experiment=[mini_base,../hostile]"],
        ["experiment=${oc.env:HOME}"],
        ["experiment=/hostile"],
        ["--experimental-rerun", "hostile.pickle"],
        ["--exp", "hostile.pickle"],
        ["--config-path", ".", "--config-name", "hostile"],
        ["-cp", ".", "-cn", "hostile"],
    ],
    ids=" ".join,
)
def test_override_that_hydra_would_load_import_or_write_is_refused(
    arguments: list[str], capfd: pytest.CaptureFixture[str]
):
    refusal(arguments, capfd)


def test_sweep_may_select_launcher_and_sweeper(capfd: pytest.CaptureFixture[str]):
    hydra = ["hydra/launcher=basic", "hydra/sweeper=basic", "hydra.sweep.dir=sweeps"]
    assert main(["--multirun", *hydra, "seed=1,2", "batch=0"]) == 64
    assert "type batch=1" in capfd.readouterr().err


def test_access_token_is_refused_and_not_repeated(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_API_KEY", "of-no-known-form")
    for text in (
        TOKEN,
        f"name={TOKEN}",
        f"--{TOKEN}",
        f"{TOKEN}=1",
        "tracking.uri=http://x/of-no-known-form",
        "name=ghp_" + "a" * 36,
    ):
        error = refusal([text], capfd)
        assert "HF_TOKEN" in error and TOKEN not in error and "of-no-known-form" not in error


def test_secret_of_the_environment_is_refused_in_settings(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "of-no-known-form")
    error = refusal(["name=${oc.env:HF_TOKEN}"], capfd)
    assert "name holds an access token" in error and "of-no-known-form" not in error


def test_bug_prints_one_line_and_writes_traceback_without_secrets(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "of-no-known-form")

    def broken(*arguments: object) -> None:
        raise RuntimeError(f"401 for {TOKEN}\nand of-no-known-form")

    monkeypatch.setattr("trainer.run.execute", broken)
    error = refusal([], capfd, code=1)
    assert "RuntimeError: 401 for *** and ***. This is a bug in the program" in error
    log = Path(re.search(r"the traceback is in (\S+)", error)[1])
    assert "in broken" in log.read_text() and "***" in log.read_text()
    assert not redaction.contains_secret(log.read_text())
    log.unlink()


def test_run_log_contains_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import logging

    from trainer.tracking.journal import Journal
    from trainer.training.run_log import log_to_folder

    monkeypatch.setenv("HF_TOKEN", "of-no-known-form")
    with Journal(tmp_path) as journal, pytest.raises(RuntimeError), log_to_folder(tmp_path, journal):
        logging.getLogger("library").warning("sent %s", TOKEN)
        raise RuntimeError(f"401 for {TOKEN} and of-no-known-form")
    for path in tmp_path.glob("*.*"):
        assert not redaction.contains_secret(path.read_text()), path
    assert "401 for *** and ***" in (tmp_path / "log.txt").read_text()


# Help and tab completion


def test_ui_has_a_help_of_its_own():
    done = run([*PROGRAM, "ui", "--help"])
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m trainer ui ") and "--port" in done.stdout


def test_help_lists_every_option_and_setting(capfd: pytest.CaptureFixture[str]):
    assert main(["--help", "method=full"]) == 0
    text = capfd.readouterr().out
    assert "python -m trainer stage=check" in text and "Hydra" not in text and "schema" not in text
    for group, options in GROUPS.items():
        assert re.search(rf"^  {group} +.*{'|'.join(options)}", text, re.MULTILINE)
    assert "max_grad_norm: 1.0" in text and "init_from: null" in text and "rank:" not in text


def test_cfg_job_prints_the_composed_settings(capfd: pytest.CaptureFixture[str]):
    assert main(["seed=3", "--cfg", "job", "experiment=null", "batch=5"]) == 0
    text = capfd.readouterr().out
    assert "\nseed: 3\n" in text and "\nbatch: 5\n" in text
    assert main(["--version"]) == 0
    assert re.match(r"trainer \d", capfd.readouterr().out)


@pytest.mark.parametrize("value", ["~/pictures", "/Bücher (2)/x", "a=b", "it's", "a, b", "\"a\" and 'b'", "C:\\data\\"])
def test_path_or_text_is_passed_on_as_typed(value: str, capfd: pytest.CaptureFixture[str]):
    """Only values with commas or quotes need quotes."""
    typed = value if not re.search("""[,'"]""", value) else json.dumps(value)
    assert main(["--cfg", "job", f"name={typed}"]) == 0
    assert yaml.safe_load(capfd.readouterr().out)["name"] == value


def test_tab_completion_completes_groups_options_and_settings(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def complete(line: str) -> list[str]:
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        assert main(["-sc", "query=bash"]) == 0
        output = capfd.readouterr()
        assert output.err == ""
        return output.out.split()

    assert complete("trainer method=lor") == ["method=lora"]
    assert complete("trainer method=full method.") == ["method.init_from=", "method.master_weights="]
    assert "optimizer.lr=" in complete("trainer optimizer.")
    assert {"model=", "steps=", "resume="} <= set(complete("trainer "))
    assert complete(f"trainer hydra.searchpath=[pkg://{CANARY}] method=l") == []
    assert CANARY not in sys.modules and not Path("trace").exists()


# The process


def run(command: list[str] | str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], **options)


def test_process_exits_with_the_code_of_the_error():
    done = run([*PROGRAM, "optimizer.lrr=1"])
    assert (done.returncode, done.stdout) == (errors.UsageError.code, "")
    assert done.stderr == "optimizer.lrr: there is no such setting; did you mean optimizer.lr?\n"


def test_missing_package_is_named_with_the_interpreter_and_what_to_type(tmp_path: Path):
    (tmp_path / "mlflow.db").touch()
    # -S hides all installed packages.
    for arguments, package in (["stage=check"], "hydra"), (["ui", "--out", str(tmp_path)], "mlflow"):
        done = run([sys.executable, "-S", "-m", "trainer", *arguments])
        assert (done.returncode, done.stdout) == (errors.InstallationError.code, "")
        assert f"package {package}, which trainer needs, is not installed" in done.stderr
        assert sys.executable in done.stderr and len(done.stderr.splitlines()) == 1
        assert re.search(r"activate|pip install", done.stderr)


def test_old_interpreter_is_refused_before_modules_that_it_cannot_import():
    old = "import sys; sys.version_info = (3, 9, 6, 'final', 0); sys.argv = ['-m']; import trainer"
    done = run([sys.executable, "-c", old])
    assert (done.returncode, done.stdout) == (errors.InstallationError.code, "")
    assert re.match(r"trainer needs Python 3\.11 or newer, and \S+ is Python 3\.9\.6\. .+\n$", done.stderr)
    imported = ("__init__", "core/__init__", "core/errors", "core/installation", "core/libraries", "core/version")
    for name in imported:
        source = (Path(__file__).parents[1] / "trainer" / f"{name}.py").read_text()
        ast.parse(source, feature_version=(3, 8))


def test_closed_stdout_is_not_an_error():
    done = run(["bash", "-c", f"set -o pipefail; {sys.executable} -m trainer --help | head -1"])
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.skipif(
    not (Path(sys.executable).parent / "trainer").exists() or not shutil.which("bash"),
    reason="the package is not installed",
)
def test_bash_completes_the_console_script():
    script = """
        eval "$(trainer -sc install=bash)"
        COMP_LINE="trainer tracking=n" COMP_POINT=18 COMP_CWORD=1 COMP_WORDS=(trainer tracking=n)
        hydra_bash_completion
        echo "${COMPREPLY[@]}"
    """
    done = run(
        ["bash", "-c", script], env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    )
    assert done.stdout == "tracking=none\n"


@pytest.mark.parametrize("setting", ["stage=sample run", "stage=check model=sd15 model.path"])
def test_name_that_is_too_long_for_the_file_system_is_refused(setting: str, capsys: pytest.CaptureFixture):
    assert main(f"{setting}={'x' * 300}".split()) == 64
    assert len(capsys.readouterr().err.splitlines()) == 1
