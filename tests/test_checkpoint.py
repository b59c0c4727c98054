"""Checkpoints: exactness, atomic saves, damage, full disks, and which ones are kept."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainer.config.sections import Save
from trainer.core import errors, libraries, rng
from trainer.precision.loss_scale import LossScale
from trainer.training.checkpoint import Checkpoints
from trainer.training.checkpoint_format import EMA, MANIFEST, OPTIMIZER, STATE, WEIGHTS, Checkpoint
from trainer.training.state import TrainingState

FILES = [WEIGHTS, OPTIMIZER, EMA, STATE, MANIFEST]


def save(checkpoints: Checkpoints, step: int, mark: float | None = None, **state: object) -> Path:
    """Saves a checkpoint whose numbers are all `mark` (default: the step). Each file is larger than the one before."""
    mark = step if mark is None else mark
    return checkpoints.save(
        step,
        weights={"w": torch.full((4,), float(mark))},
        optimizer={
            "state": {0: {"m": torch.full((16,), float(mark)), "step": mark}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        ema={"w": torch.full((40,), float(mark))},
        state={"mark": mark, "patience": 3, "note": "." * 120, **state},
    )


def assert_holds(loaded: Checkpoint | None, step: int, mark: float | None = None) -> None:
    """Asserts that a checkpoint is the one that `save` wrote."""
    mark = step if mark is None else mark
    assert loaded is not None and loaded.step == step and loaded.state["mark"] == mark
    state = loaded.optimizer["state"][0]
    assert state["step"] == mark
    assert loaded.ema is not None
    for tensor, size in ((loaded.weights["w"], 4), (state["m"], 16), (loaded.ema["w"], 40)):
        assert torch.equal(tensor, torch.full((size,), float(mark)))


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Relative path -> modification time and contents of everything in a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def run_in_child(action: Callable[[], object]) -> int:
    """Runs `action` in a forked process. Returns its exit code, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:  # Also after a failed assertion: the child must never continue as a second pytest.
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_before(number: int, action: Callable[[], object]) -> Callable[[], None]:
    """Returns `action` in a process that dies before its file operation of this number, counted from 1."""

    def run() -> None:
        count = 0

        def operation(*_: object) -> None:
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)

        def hook(event: str, values: tuple) -> None:
            if event in CHANGE_EVENTS or (event == "open" and values[2] & WRITE_FLAGS):
                operation()

        # The death of a process loses no data that it has written, so there is no need to wait for the disk.
        os.fsync = operation
        # Python raises audit events for all operations that change the disk. Torn writes have their own test.
        sys.addaudithook(hook)
        action()

    return run


CHANGE_EVENTS = {"os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir"}
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    """The checkpoints of steps 1 and 2, the last two of which are kept."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2, report=lambda text: None)
    save(checkpoints, 1)
    save(checkpoints, 2)
    return checkpoints


def test_save_and_load_are_bit_exact(tmp_path):
    weights = {
        "half": torch.randn(5, 3).to(torch.bfloat16),
        "tiny": torch.randn(4).to(torch.float8_e4m3fn),
        "columns": torch.randn(3, 4).T,
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "number": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 2),
        "negative zero": torch.tensor([-0.0, 1e-45]),
    }
    weights["tied"] = weights["half"]
    weights["row"] = weights["columns"][1]
    weights["parameter"] = torch.nn.Parameter(torch.randn(3))
    optimizer = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1), 3: (1, [None, True, float("inf")], {})}, "empty": []}
    state = {"val_loss": 0.1 + 0.2, "list": [1, None], "name": "ß", "best": float("inf")}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(7, weights, optimizer, None, state)
    loaded = checkpoints.newest()
    assert (loaded.step, loaded.ema, loaded.state) == (7, None, state)
    assert loaded.weights.keys() == weights.keys()
    for name, tensor in weights.items():
        back = loaded.weights[name]
        assert back.dtype == tensor.dtype and back.shape == tensor.shape
        assert (
            back.view(-1).contiguous().view(torch.uint8).tolist()
            == tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()
        )
    assert repr(loaded.optimizer) == repr(optimizer)


def make_optimizer(name: str, parameters: list) -> torch.optim.Optimizer:
    if name == "prodigy":
        import prodigyopt

        return prodigyopt.Prodigy(parameters, weight_decay=0.01, safeguard_warmup=True)
    if name in ("adamw8bit", "adam8bit"):
        optimizers = libraries.import_bitsandbytes().optim
        return (optimizers.AdamW8bit if name == "adamw8bit" else optimizers.Adam8bit)(parameters, lr=1e-2)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    if name == "plain sgd":
        return torch.optim.SGD(parameters, lr=0.1)
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 1e-3}]
    return torch.optim.AdamW(
        groups, lr=torch.tensor(1e-2) if name == "adamw with a tensor for lr" else 1e-2, amsgrad=True
    )


def take_steps(parameters: list, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.from_numpy(
                rng.generator(0, "gradient", step, index).standard_normal(parameter.shape, "float32")
            )
        optimizer.step()


def assert_same(one: object, other: object) -> None:
    """Asserts that two nested values have the same types, keys and tensors."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


@pytest.mark.parametrize(
    "name", ["adamw", "adamw with a tensor for lr", "sgd", "plain sgd", "prodigy", "adamw8bit", "adam8bit"]
)
def test_optimizer_continues_from_a_checkpoint_bit_exactly(tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shapes = [(64, 80), (7,)]  # Only the first is large enough for an 8-bit state.
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = make_optimizer(name, parameters)
    take_steps(parameters, optimizer, range(3))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(
        3, {str(index): parameter for index, parameter in enumerate(parameters)}, optimizer.state_dict(), None, {}
    )

    loaded = checkpoints.newest()
    assert_same(loaded.optimizer, optimizer.state_dict())
    resumed = [torch.nn.Parameter(loaded.weights[str(index)]) for index in range(len(shapes))]
    other = make_optimizer(name, resumed)
    other.load_state_dict(loaded.optimizer)
    assert_same(other.state_dict(), optimizer.state_dict())
    take_steps(parameters, optimizer, range(3, 6))
    take_steps(resumed, other, range(3, 6))
    for parameter, twin in zip(parameters, resumed, strict=True):
        assert torch.equal(parameter, twin)
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("again", [False, True], ids=["next step", "existing step"])
def test_dying_at_any_operation_of_a_save_leaves_the_old_or_new_checkpoint(tmp_path, again):
    """F02 and F07 with keep = 2: step 3 is saved and step 1 deleted, or step 2 is saved again."""
    step, mark = (2, 2.5) if again else (3, 3)
    original, run = tmp_path / "original", tmp_path / "run"
    before = Checkpoints(original / "checkpoints", keep=2)
    save(before, 1)
    save(before, 2)
    old, new, number = 0, 0, 0
    while True:
        number += 1
        shutil.copytree(original, run)
        checkpoints = Checkpoints(run / "checkpoints", keep=2)
        code = run_in_child(die_before(number, lambda: save(checkpoints, step, mark)))  # noqa: B023
        assert code in (0, 9)
        reports: list[str] = []
        checkpoints = Checkpoints(run / "checkpoints", keep=2, report=reports.append)
        for _ in ("before the next start cleans up", "after it"):
            loaded = checkpoints.newest()
            is_new = loaded.step == step and loaded.state["mark"] == mark
            assert_holds(loaded, *((step, mark) if is_new else (2, 2)))
            undamaged = [Checkpoints(run / "checkpoints", 2).load(step) for step in checkpoints.steps()]
            assert len(undamaged) >= 2  # Also while the oldest is being deleted.
            checkpoints.clean()
            assert not [path for path in (run / "checkpoints").iterdir() if not path.name.startswith("step-")]
        assert not reports and not (run / "quarantine").exists()
        save(checkpoints, 4)
        assert_holds(checkpoints.newest(), 4)
        assert len(list((run / "checkpoints").iterdir())) == 2
        shutil.rmtree(run)
        old, new = old + (not is_new), new + is_new
        if code == 0:
            break
    assert is_new and old >= 12 and new >= 8, (old, new)


def test_a_torn_write_leaves_the_old_checkpoint(tmp_path):
    """The kernel kills the process when a file exceeds the size limit, after any number of bytes and in every file."""
    original, run = tmp_path / "original", tmp_path / "run"
    save(Checkpoints(original / "checkpoints", keep=2), 1)
    sizes = [(original / "checkpoints" / "step-00000001" / name).stat().st_size for name in FILES]
    assert sizes == sorted(sizes)  # So each file in turn exceeds a limit.

    def save_within(limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(Checkpoints(run / "checkpoints", keep=2), 2)

    for limit in sorted({limit for size in sizes for limit in (0, 1, size // 2, size - 1)}):
        shutil.copytree(original, run)
        assert run_in_child(lambda: save_within(limit)) == -signal.SIGXFSZ  # noqa: B023
        assert len(list((run / "checkpoints").glob(".partial-*"))) == 1
        checkpoints = Checkpoints(run / "checkpoints", keep=2)
        assert_holds(checkpoints.newest(), 1)
        checkpoints.clean()
        save(checkpoints, 2)
        assert_holds(checkpoints.newest(), 2)
        shutil.rmtree(run)


def test_a_checkpoint_is_named_when_it_is_on_the_disk_and_old_ones_go_later(checkpoints, monkeypatch):
    events: list[tuple[str, object]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        events.append(("fsync", os.fstat(descriptor).st_ino))

    def rename(source: Path, target: Path) -> None:
        events.append(("rename", Path(target).name))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    folder = save(checkpoints, 3)
    committed = events.index(("rename", "step-00000003"))
    synced = [inode for kind, inode in events[:committed] if kind == "fsync"]
    assert {(folder / name).stat().st_ino for name in FILES} <= set(synced) and synced[-1] == folder.stat().st_ino
    assert events[committed + 1] == ("fsync", checkpoints.folder.stat().st_ino)
    assert [kind for kind, _ in events[committed + 2 :]] == ["rename"] and events[-1][1].startswith(".discarded-")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_checkpoint_is_quarantined_and_the_previous_one_used(checkpoints, name):
    """F03."""
    path = checkpoints.folder / "step-00000002" / name
    content = path.read_bytes()
    reports: list[str] = []
    checkpoints.report = reports.append
    for number, length in enumerate((0, 1, len(content) // 2, len(content) - 1)):
        path.write_bytes(content[:length])
        expected = tree(checkpoints.folder / "step-00000002")
        assert_holds(checkpoints.newest(), 1)
        suffix = "" if number == 0 else f"-{number + 1}"
        quarantined = checkpoints.folder.parent / "quarantine" / f"step-00000002{suffix}"
        assert tree(quarantined) == expected and checkpoints.steps() == [1]
        assert len(reports) == number + 1 and "\n" not in reports[-1]
        assert name in reports[-1] and str(quarantined) in reports[-1]
        save(checkpoints, 2)


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_missing_file_is_damaged(checkpoints, name):
    (checkpoints.folder / "step-00000002" / name).unlink()
    assert_holds(checkpoints.newest(), 1)


def test_all_of_a_hundred_flipped_bits_are_detected(checkpoints):
    """F04."""
    found = []
    checkpoints.report = found.append
    for number in range(100):
        path = checkpoints.folder / "step-00000002" / FILES[number % len(FILES)]
        content = path.read_bytes()
        position = int(rng.generator(0, "flip", number).integers(8 * len(content)))
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert_holds(checkpoints.newest(set_aside=False), 1)
        assert path.name in found[-1]
        path.write_bytes(content)
    assert len(found) == 100
    assert_holds(checkpoints.newest(), 2)


def test_a_renamed_checkpoint_is_damaged(checkpoints):
    os.rename(checkpoints.folder / "step-00000002", checkpoints.folder / "step-00000005")
    assert_holds(checkpoints.newest(), 1)


@pytest.mark.parametrize(
    "leftover", ["unfinished save", "empty folder", "half a checkpoint", "checkpoint of the same step", "file"]
)
def test_leftovers_of_the_next_step_do_not_prevent_its_save(checkpoints, leftover):
    """F05."""
    folder = checkpoints.folder / "step-00000003"
    if leftover == "unfinished save":
        (checkpoints.folder / f".partial-{os.getpid()}-3").mkdir()
        (checkpoints.folder / f".partial-{os.getpid()}-3" / WEIGHTS).write_bytes(b"half")
    elif leftover == "file":
        folder.write_text("in the way")
    elif leftover == "checkpoint of the same step":
        save(checkpoints, 3, mark=0.5)
    else:
        folder.mkdir()
        if leftover == "half a checkpoint":
            (folder / WEIGHTS).write_bytes(b"half")
    save(checkpoints, 3)
    assert_holds(checkpoints.newest(), 3)
    checkpoints.clean()
    left = [path.name for path in checkpoints.folder.iterdir() if path.is_dir()]
    assert sorted(left) == ["step-00000002", "step-00000003"]


def test_a_save_on_a_full_disk_changes_nothing_and_the_next_one_succeeds(checkpoints):
    """F06. A size limit of the kernel takes the place of a full disk; safetensors reports both in the same way."""
    expected = tree(checkpoints.folder.parent)
    size = (checkpoints.folder / "step-00000001" / EMA).stat().st_size

    def run() -> None:
        for limit in (0, 10, size - 1, size + 1):  # In the weights, the optimizer, the average, the state.
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(errors.StorageError, match=r"step-00000003.*too large"):
                save(checkpoints, 3)
            # The modification time of the folder itself changes.
            assert tree(checkpoints.folder.parent) | {"checkpoints": None} == expected | {"checkpoints": None}
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        save(checkpoints, 3)

    assert run_in_child(run) == 0
    assert_holds(checkpoints.newest(), 3)


@pytest.mark.parametrize("place", ["/proc/run/checkpoints", "file/checkpoints"])
def test_a_folder_without_write_access_is_named_in_a_storage_error(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(errors.StorageError, match=f"{place}/step-00000001") as caught:
        save(Checkpoints(tmp_path / place, keep=1), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_if_all_checkpoints_are_damaged_none_is_moved_and_the_run_is_refused(checkpoints, damage):
    """F08."""
    for name in ("step-00000001", "step-00000002"):
        path = checkpoints.folder / name / WEIGHTS
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] + (b"" if damage == "truncated" else b"\xff"))
    expected = tree(checkpoints.folder.parent)
    start = time.perf_counter()
    with pytest.raises(errors.DataError) as caught:
        checkpoints.newest()
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert all(name in message for name in (str(checkpoints.folder), "step-00000001", "step-00000002"))
    assert "\n" not in message
    assert tree(checkpoints.folder.parent) == expected


def test_training_state_is_stored_under_the_names_that_old_checkpoints_have():
    state = TrainingState(evaluated=4, val_loss=0.5, best=0.25, since_best=2, skipped=1)
    stored = {"evaluated": 4, "val_loss": 0.5, "best": 0.25, "since_best": 2, "skipped": 1}
    scale = {"value": 1024.0, "since": 7}
    assert state.to_checkpoint(4, None) == stored
    assert state.to_checkpoint(5, LossScale(**scale)) == stored | {"val_loss": None, "loss_scale": scale}
    assert TrainingState.from_checkpoint(stored | {"loss_scale": scale}).to_checkpoint(4, None) == stored


def test_having_no_checkpoint_is_not_an_error_and_creates_no_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    checkpoints.clean()
    assert checkpoints.newest() is None and checkpoints.best() is None and checkpoints.steps() == []
    with pytest.raises(errors.UsageError, match="none"):
        checkpoints.load(3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["weights", "optimizer", "ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_tensors_are_never_saved(checkpoints, place, value):
    """F16."""
    expected = tree(checkpoints.folder)
    contents = {
        "weights": {"w": torch.ones(3)},
        "optimizer": {"state": {0: {"m": torch.ones(3)}}},
        "ema": {"w": torch.ones(3)},
    }
    (contents[place]["state"][0]["m"] if place == "optimizer" else contents[place]["w"])[1] = value
    with pytest.raises(errors.NonFiniteError, match=f"Step 3 .*{place if place != 'ema' else 'ema.safetensors'}"):
        checkpoints.save(3, **contents, state={})
    assert tree(checkpoints.folder) == expected


def test_the_last_checkpoints_by_step_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step, loss in enumerate([0.9, 0.3, float("nan"), 0.3, None, float("-inf"), 0.5], start=1):
        folder = save(checkpoints, step, **({} if loss is None else {"val_loss": loss}))
        os.utime(folder, (10**9 - step, 10**9 - step))
    assert checkpoints.steps() == [2, 6, 7]
    assert_holds(checkpoints.best(), 2)
    assert_holds(checkpoints.newest(), 7)
    assert_holds(checkpoints.load(6), 6)
    save(checkpoints, 8, val_loss=0.1)
    assert checkpoints.steps() == [7, 8] and checkpoints.best().step == 8
    with pytest.raises(errors.UsageError, match=r"step 6 .*7, 8"):
        checkpoints.load(6)


def test_steps_are_sorted_as_numbers(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (99_999_999, 100_000_000, 100_000_001):
        save(checkpoints, step)
    assert checkpoints.steps() == [100_000_000, 100_000_001]
    assert checkpoints.newest().step == 100_000_001


def test_a_save_keeps_its_checkpoint_even_if_there_are_later_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    save(checkpoints, 9)
    save(checkpoints, 5)
    assert checkpoints.steps() == [5, 9]


def test_a_damaged_best_checkpoint_is_reported_and_the_next_best_used(tmp_path):
    reports: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=5, report=reports.append)
    for step in (1, 2, 3):
        save(checkpoints, step, val_loss=float(step))
    (checkpoints.folder / "step-00000001" / WEIGHTS).write_bytes(b"")
    assert checkpoints.best().step == 2 and "step-00000001" in reports[0]
    with pytest.raises(errors.DataError, match=WEIGHTS):
        checkpoints.load(1)
    assert checkpoints.steps() == [1, 2, 3]


def test_a_moved_run_folder_can_be_read(checkpoints, tmp_path):
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    assert_holds(Checkpoints(tmp_path / "elsewhere" / "checkpoints", keep=2).newest(), 2)


def test_cleaning_removes_unfinished_files_but_no_files_of_the_user(checkpoints):
    (checkpoints.folder / ".partial-1-abc-step-00000009").mkdir()
    (checkpoints.folder / ".discarded-abc-step-00000000" / "deep").mkdir(parents=True)
    (checkpoints.folder / "my notes").mkdir()
    (checkpoints.folder / "notes.txt").write_text("mine")
    checkpoints.clean()
    save(checkpoints, 3)
    assert sorted(os.listdir(checkpoints.folder)) == ["my notes", "notes.txt", "step-00000002", "step-00000003"]


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
def test_a_pickle_under_a_forged_manifest_is_never_executed(checkpoints, tmp_path, monkeypatch, name):
    """F30. The manifest protects from damage; what protects from attacks is that only safe formats are read."""
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        folder = checkpoints.folder / f"step-0000000{step}"
        (folder / name).write_bytes(pickle.dumps(Payload()))
        manifest = json.loads((folder / MANIFEST).read_bytes().splitlines()[0])
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        body = json.dumps(manifest).encode()
        (folder / MANIFEST).write_bytes(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n")
    with pytest.raises(errors.DataError, match=f"{name} cannot be read"):
        checkpoints.newest()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("settings", [{"every": 0}, {"keep": 0}, {"every": -1}])
def test_settings_that_save_or_keep_nothing_are_refused(settings):
    with pytest.raises(errors.UsageError, match=r"save\.(every|keep)"):
        Save(**settings)


def test_checkpoint_modules_import_no_heavy_library():
    script = (
        "import sys, trainer.training.checkpoint, trainer.core.files; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'safetensors', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
