"""Runs in several processes give the results of one. The real program is forked once per rank, as by a launcher."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from program import (
    DEMO,
    SCHEDULE,
    Action,
    Harness,
    Result,
    RunningProgram,
    at_call,
    fingerprint,
    last_logged_step,
    losses,
    newest_checkpoint,
    raise_signal,
    records,
    run_all,
    single_run,
)
from torch.distributed import TCPStore

from trainer.config.groups import GROUPS
from trainer.distributed.sharding import is_sharded

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
STEP = "trainer.training.predictor:Predictor.losses"
EVALUATION = "trainer.training.evaluator:held_out_loss"
SAVE = "trainer.core.tensor_files:save_tensors"
KILLED = raise_signal(signal.SIGKILL)
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""Environment variables that `accelerate launch --config_file launch/fsdp2.yaml` sets."""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("processes"))


@dataclass(slots=True)
class Launched:
    """The processes of one run, and the store through which they connect, which the launcher owns."""

    processes: list[RunningProgram]
    store: TCPStore

    def wait(self) -> list[Result]:
        return [process.wait() for process in self.processes]


def launch(
    harness: Harness,
    out: Path,
    *settings: str,
    count: int = 2,
    setup: dict[int, Action] | None = None,
    **environment: str,
) -> Launched:
    """Starts the program in `count` processes. `setup` maps ranks to actions that run in the process first."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **environment,
    }

    def prepare(rank: int) -> Action:
        variables = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return run_all(lambda: os.environ.update(variables), (setup or {}).get(rank, lambda: None))

    return Launched([harness.start(out, *settings, setup=prepare(rank)) for rank in range(count)], store)


def finish(harness: Harness, out: Path, *settings: str, count: int = 2, **environment: str) -> Path:
    """Runs to the end, which must succeed, and returns the run folder. Only the first process may print anything."""
    results = launch(harness, out, *settings, count=count, **environment).wait()
    assert [result.code for result in results] == [0] * count, results
    assert [result.output for result in results[1:]] == [""] * (count - 1), results
    return single_run(out)


def assert_same_losses(folder: Path, reference: Path) -> None:
    """Asserts that two runs have the same losses, up to the order of float32 additions."""
    ours, theirs = losses(folder), losses(reference)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    for (*_, loss), (*_, expected) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)


def reasons(results: list[Result]) -> list[str]:
    """Returns the paragraphs in which processes print why they end: all output except that of training."""
    lines = [line for result in results for line in result.output.splitlines()]
    return [
        line
        for line in lines
        if line
        and "training:" not in line
        and "encoding:" not in line
        and not line.startswith(("cache:", "continuing", "precision:", "step "))
        and " steps of " not in line
    ]


@pytest.mark.parametrize(
    ("count", "settings"),
    [(2, ["batch=5", "hardware.micro_batch=2"]), pytest.param(3, ["batch=2"], marks=pytest.mark.slow)],
)
def test_an_unevenly_shared_batch_gives_the_losses_of_one_process(harness: Harness, count: int, settings: list[str]):
    """Two processes share five samples as three and two; of three processes that share two samples, one has none."""
    folder = finish(harness, harness.new_folder(), *settings, count=count)
    assert_same_losses(folder, harness.reference(*settings))
    assert [record["number"] for record in records(folder, "attempt")] == [1]


def test_a_run_resumes_with_another_number_of_processes(harness: Harness):
    out = harness.new_folder()
    for count, call in ((2, 2), (1, 2)):
        stop = {rank: at_call(STEP, call, raise_signal(signal.SIGTERM)) for rank in range(count)}
        results = (
            launch(harness, out, count=count, setup=stop).wait() if count > 1 else [harness.run(out, setup=stop[0])]
        )
        assert [result.code for result in results] == [143] * count, results
    assert_same_losses(finish(harness, out), harness.reference())
    assert [record["start"] for record in records(single_run(out), "attempt")] == [0, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_ends_all_after_the_same_step(harness: Harness, number: int):
    """A launcher signals all processes, at slightly different times; a batch system may signal a single one."""
    out = harness.new_folder()
    results = launch(harness, out, setup={1: at_call(STEP, 3, raise_signal(number))}).wait()
    assert [result.code for result in results] == [128 + number] * 2, results
    assert results[1].output == ""
    assert newest_checkpoint(single_run(out)).step == 3
    assert_same_losses(finish(harness, out), harness.reference())


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_ends_all(harness: Harness, rank: int):
    out = harness.new_folder()
    results = launch(harness, out, count=3, setup={rank: at_call(STEP, 3, KILLED)}).wait()
    assert [result.code for result in results] == [-signal.SIGKILL if i == rank else 74 for i in range(3)], results
    assert max(result.seconds for result in results) < 30
    (paragraph,) = reasons(results)
    assert "has ended or cannot be reached" in paragraph and "The same command continues" in paragraph
    assert_same_losses(finish(harness, out), harness.reference())


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["optimizer.lrr=1"], 64, "optimizer.lrr"),
        (["dataset=pairs", "dataset.path=nowhere"], 65, "nowhere"),
        (["optimizer=sgd", "optimizer.lr=1e38", "steps=9"], 70, "loss"),
    ],
)
def test_an_error_of_all_processes_is_printed_once(harness: Harness, settings: list[str], code: int, words: str):
    results = launch(harness, harness.new_folder(), *settings).wait()
    assert [result.code for result in results] == [code] * 2, results
    (paragraph,) = reasons(results)
    assert words in paragraph


def test_a_single_process_that_accelerate_started_for_several_is_refused(harness: Harness):
    """Sets the environment variables that `accelerate launch --cpu --num_processes 2` sets."""
    out = harness.new_folder()
    variables = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    result = harness.run(out, setup=lambda: os.environ.update(variables))
    assert (
        result.code == 64 and "accelerate launch --multi_gpu --num_processes 2 -m trainer hardware=cpu" in result.output
    )
    assert not list(out.iterdir())


# Sharded networks


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, ["batch=5", "hardware.micro_batch=1"]),
        (2, ["method=full", "hardware.gradient_checkpointing=true"]),
        (3, ["method=full", "batch=2"]),
    ],
)
@pytest.mark.slow
def test_a_sharded_network_gives_the_losses_and_files_of_an_unsharded_one(
    harness: Harness, count: int, settings: list[str]
):
    """Also with unequal numbers of micro-batches, and if a process has no sample at all."""
    folder, reference = (
        finish(harness, harness.new_folder(), *settings, count=count, **SHARDED),
        harness.reference(*settings),
    )
    assert_same_losses(folder, reference)
    assert [path.relative_to(folder) for path in sorted(folder.rglob("*"))] == [
        path.relative_to(reference) for path in sorted(reference.rglob("*"))
    ]
    ours, theirs = newest_checkpoint(folder), newest_checkpoint(reference)
    for name in theirs.weights:
        torch.testing.assert_close(ours.weights[name], theirs.weights[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["method=lora"], ["method=full", "hardware.gradient_checkpointing=true"]])
@pytest.mark.parametrize("family", sorted(name for name, kind in GROUPS["model"].items() if "full" in kind.methods))
def test_every_family_can_be_sharded(tmp_path: Path, family: str, settings: list[str]):
    harness = Harness(tmp_path, family)
    assert_same_losses(finish(harness, harness.new_folder(), *settings, **SHARDED), harness.reference(*settings))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "loha", "lokr"])
def test_every_adapter_trains_beside_a_sharded_network(harness: Harness, method: str):
    assert_same_losses(
        finish(harness, harness.new_folder(), f"method={method}", **SHARDED), harness.reference(f"method={method}")
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_sharding_changes_no_bit_of_an_adapter_beside_low_precision_weights(harness: Harness, precision: str):
    """Compared with unsharded processes, as low-precision products depend on how a batch is divided."""
    settings = [f"precision={precision}", "batch=5", "hardware.gradient_checkpointing=true"]
    assert fingerprint(finish(harness, harness.new_folder(), *settings, **SHARDED)) == fingerprint(
        finish(harness, harness.new_folder(), *settings)
    )


def test_a_run_resumes_sharded_or_unsharded(harness: Harness):
    """Checkpoints are the same files. The run begins and ends sharded; of five micro-batches one process has two."""
    out, settings = harness.new_folder(), ["method=full", "ema=0.9", "batch=5", "hardware.micro_batch=1"]
    sharded = launch(
        harness, out, *settings, setup={1: at_call(STEP, 4, raise_signal(signal.SIGTERM))}, **SHARDED
    ).wait()
    assert [result.code for result in sharded] == [143, 143], sharded
    assert harness.run(out, *settings, setup=at_call(STEP, 6, raise_signal(signal.SIGTERM))).code == 143
    assert_same_losses(finish(harness, out, *settings, **SHARDED), harness.reference(*settings))
    assert [record["start"] for record in records(single_run(out), "attempt")] == [0, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_process_holds_only_its_shard(harness: Harness, method: str):
    out = harness.new_folder()
    counts = {rank: out / f"{rank}" for rank in (0, 1)}
    assert [
        result.code
        for result in launch(
            harness, out, f"method={method}", setup={rank: count_parameters(counts[rank]) for rank in counts}, **SHARDED
        ).wait()
    ] == [0, 0]
    total, local = zip(*(map(int, path.read_text().split()) for path in counts.values()), strict=True)
    assert total[0] == total[1] and max(local) < (0.6 if method == "full" else 0.65) * total[0]


def count_parameters(path: Path) -> Action:
    """Writes down the number of parameters of the network, and how many this process holds when training begins."""

    def set_up() -> None:
        from trainer.training.session import Session

        train = Session.train

        def counting(self):
            parameters = list(self.network.parameters())
            local = sum((p.to_local() if is_sharded(p) else p).numel() for p in parameters)
            path.write_text(f"{sum(p.numel() for p in parameters)} {local}")
            return train(self)

        Session.train = counting

    return set_up


@pytest.mark.slow
@pytest.mark.parametrize("where", [EVALUATION, SAVE])
def test_a_signal_while_a_sharded_network_is_evaluated_or_saved_ends_all(harness: Harness, where: str):
    out, settings = harness.new_folder(), ["method=full"]
    results = launch(
        harness, out, *settings, setup={0: at_call(where, 2, raise_signal(signal.SIGTERM))}, **SHARDED
    ).wait()
    assert [result.code for result in results] == [143, 143], results
    assert_same_losses(finish(harness, out, *settings), harness.reference(*settings))


@pytest.mark.slow
@pytest.mark.parametrize("where", [STEP, EVALUATION])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_of_a_sharded_network_that_is_killed_ends_all(harness: Harness, where: str, rank: int):
    out = harness.new_folder()
    results = launch(harness, out, "method=full", setup={rank: at_call(where, 3, KILLED)}, **SHARDED).wait()
    assert sorted(result.code for result in results) == [-signal.SIGKILL, 74], results
    (paragraph,) = reasons(results)
    assert "has ended or cannot be reached" in paragraph


def fail(error: BaseException) -> Action:
    def action() -> None:
        raise error

    return action


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "where", "error", "code", "words"),
    [
        (0, SAVE, OSError(errno.ENOSPC, "No space left on device"), 74, "No space left"),
        (1, STEP, MemoryError(), 71, "memory"),
        (1, EVALUATION, ValueError("a bug"), 1, "a bug"),
    ],
)
def test_an_error_in_one_process_of_a_sharded_network_is_printed_once_and_ends_all(
    harness: Harness, rank: int, where: str, error: BaseException, code: int, words: str
):
    results = launch(
        harness, harness.new_folder(), "method=full", setup={rank: at_call(where, 2, fail(error))}, **SHARDED
    ).wait()
    assert results[rank].code == code and results[1 - rank].code, results
    (paragraph,) = reasons(results)
    assert words in paragraph


@pytest.mark.parametrize(
    ("settings", "environment", "words"),
    [
        (["method=full", "optimizer=prodigy"], {}, "optimizer=adamw"),
        (["hardware.compile=true"], {}, "hardware.compile"),
        (["export.formats=[pipeline]"], {}, "stage=export"),
        ([], {"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ([], {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_settings_that_sharding_does_not_support_are_refused(
    harness: Harness, settings: list[str], environment: dict[str, str], words: str
):
    """They are refused before the processes connect, so one process is enough for this test."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **SHARDED, **environment}
    out = harness.new_folder()
    result = harness.run(out, *settings, setup=lambda: os.environ.update(variables))
    assert result.code == 64 and words in result.output, result
    assert not list(out.iterdir())


# The real launcher


def accelerate(harness: Harness, out: Path, how: list[str], *settings: str) -> subprocess.Popen[str]:
    """Starts `accelerate launch`."""
    program = [str(Path(sys.executable).with_name("accelerate")), "launch", *how, "-m", "trainer"]
    arguments = [*harness.settings, *DEMO, *SCHEDULE, f"out={out}", *settings]
    return subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_accelerate_launch_trains_saves_on_sigterm_and_resumes_sharded(harness: Harness):
    out, settings = harness.new_folder(), ["steps=80", "save.every=1000", "evaluation.every=80"]
    launcher = accelerate(harness, out, ["--config_file", str(LAUNCH / "cpu.yaml")], *settings)
    while not list(out.glob("*/journal.jsonl")) or last_logged_step(single_run(out)) < 3:
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.05)
    launcher.terminate()
    text, _ = launcher.communicate(timeout=300)
    saved = newest_checkpoint(single_run(out)).step
    assert launcher.returncode and f"saved at step {saved} of 80" in text and 3 <= saved < 80, text
    assert text.count("stopped by SIGTERM") == 1, text
    launcher = accelerate(harness, out, ["--config_file", str(LAUNCH / "fsdp2.yaml")], *settings)
    text, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0 and f"continuing at step {saved}" in text and "each with a shard" in text, text
    assert_same_losses(single_run(out), harness.reference(*settings))


@pytest.mark.slow
def test_the_refusal_of_a_single_process_names_a_command_that_works(harness: Harness):
    out = harness.new_folder()
    text, _ = (launcher := accelerate(harness, out, ["--num_processes", "2", "--cpu"])).communicate(timeout=300)
    assert launcher.returncode and "accelerate launch --multi_gpu --num_processes 2 -m trainer hardware=cpu" in text, (
        text
    )
    text, _ = (launcher := accelerate(harness, out, ["--multi_gpu", "--num_processes", "2"])).communicate(timeout=300)
    assert launcher.returncode == 0 and "in 2 processes" in text, text
    assert_same_losses(single_run(out), harness.reference())


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_the_files_in_launch(path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_machines == 1
    assert f"launch/{path.name}" in (LAUNCH / "README.md").read_text()
