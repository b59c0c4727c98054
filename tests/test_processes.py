"""Several processes train one run as one would: the real program, forked once for each rank, as a launcher starts it."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from program import Action, Ended, Lab, Started, all_of, at, checkpoint, losses, only_run, records, to_itself
from torch.distributed import TCPStore

STEP = "trainer.run:Training._losses"
KILLED = to_itself(signal.SIGKILL)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("processes"))


@dataclass(slots=True)
class Launched:
    """What a launcher holds: the processes of one run, and the store in which they meet."""

    processes: list[Started]
    store: TCPStore

    def signal(self, number: int) -> None:
        for process in self.processes:
            process.signal(number)

    def wait(self) -> list[Ended]:
        return [process.wait() for process in self.processes]


def launch(lab: Lab, out: Path, *settings: str, count: int = 2, before: dict[int, Action] | None = None, **environment: str) -> Launched:
    """The program in `count` processes; `before` sets the scene for single ranks."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **environment,
    }

    def scene(rank: int) -> Action:
        told = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return all_of(lambda: os.environ.update(told), (before or {}).get(rank, lambda: None))

    return Launched([lab.start(out, *settings, before=scene(rank)) for rank in range(count)], store)


def finish(lab: Lab, out: Path, *settings: str, count: int = 2, **environment: str) -> Path:
    """The folder of a run that must succeed; only the first process says anything."""
    ended = launch(lab, out, *settings, count=count, **environment).wait()
    assert [end.code for end in ended] == [0] * count, ended
    assert [end.text for end in ended[1:]] == [""] * (count - 1), ended
    return only_run(out)


def assert_same_losses(folder: Path, reference: Path) -> None:
    """That two runs measured the same, but for the order in which float32 was added."""
    ours, theirs = losses(folder), losses(reference)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    for (*_, loss), (*_, expected) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)


def told(ended: list[Ended]) -> list[str]:
    """The paragraphs in which the processes say why they end: all that is no progress."""
    lines = [line for end in ended for line in end.text.splitlines()]
    return [
        line
        for line in lines
        if line and "training:" not in line and not line.startswith(("cache:", "continuing")) and " steps of " not in line
    ]


@pytest.mark.parametrize(("count", "settings"), [(2, ["batch=5", "hardware.micro_batch=2"]), (3, ["batch=2"])])
def test_processes_that_share_a_batch_unevenly_give_the_losses_of_one(lab: Lab, count: int, settings: list[str]):
    """Of five samples two processes have three and two; of two samples the third process has none."""
    folder = finish(lab, lab.place(), *settings, count=count)
    assert_same_losses(folder, lab.reference(*settings))
    assert [record["number"] for record in records(folder, "attempt")] == [1]


def test_a_run_goes_on_with_another_number_of_processes(lab: Lab):
    out = lab.place()
    for count, forward in ((2, 2), (1, 2)):
        stop = {rank: at(STEP, forward, to_itself(signal.SIGTERM)) for rank in range(count)}
        ended = launch(lab, out, count=count, before=stop).wait() if count > 1 else [lab.run(out, before=stop[0])]
        assert [end.code for end in ended] == [143] * count, ended
    assert_same_losses(finish(lab, out), lab.reference())
    assert [record["start"] for record in records(only_run(out), "attempt")] == [0, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_ends_all_after_the_same_step(lab: Lab, number: int):
    """Launchers signal all, at moments of their own; a batch system may signal one."""
    out = lab.place()
    ended = launch(lab, out, before={1: at(STEP, 3, to_itself(number))}).wait()
    assert [end.code for end in ended] == [128 + number] * 2, ended
    assert ended[1].text == ""
    assert checkpoint(only_run(out)).step == 3
    assert_same_losses(finish(lab, out), lab.reference())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_all(lab: Lab, rank: int):
    out = lab.place()
    ended = launch(lab, out, count=3, before={rank: at(STEP, 3, KILLED)}).wait()
    assert [end.code for end in ended] == [-signal.SIGKILL if i == rank else 74 for i in range(3)], ended
    assert max(end.seconds for end in ended) < 30
    (paragraph,) = told(ended)
    assert "has ended or cannot be reached" in paragraph and "The same command continues" in paragraph
    assert_same_losses(finish(lab, out), lab.reference())


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["optimizer.lrr=1"], 64, "optimizer.lrr"),
        (["dataset=pairs", "dataset.path=nowhere"], 65, "nowhere"),
        (["optimizer=sgd", "optimizer.lr=1e38", "steps=9"], 70, "loss"),
    ],
)
def test_what_ends_all_is_said_once(lab: Lab, settings: list[str], code: int, words: str):
    ended = launch(lab, lab.place(), *settings).wait()
    assert [end.code for end in ended] == [code] * 2, ended
    (paragraph,) = told(ended)
    assert words in paragraph


def test_accelerate_that_starts_one_process_of_several_is_not_taken_for_a_run_of_one(lab: Lab):
    """The environment that `accelerate launch --cpu --num_processes 2` makes."""
    out = lab.place()
    scene = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    ended = lab.run(out, before=lambda: os.environ.update(scene))
    assert ended.code == 64 and "accelerate launch --multi_gpu --num_processes 2 -m trainer hardware=cpu" in ended.text
    assert not list(out.iterdir())
