"""Atomic writes, safetensors files, remembered digests and the lock."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.core import digests, documents, errors, files, tensor_files
from trainer.core.digests import Digests, sha256
from trainer.core.lock import Lock


@pytest.fixture(scope="module")
def aged(tmp_path_factory) -> Path:
    """A folder of files that are old enough to be remembered. A ctime cannot be set back, so this has to wait."""
    folder = tmp_path_factory.mktemp("aged")
    for number in range(8):
        (folder / str(number)).write_text(str(number))
    time.sleep(2.1)
    return folder


def count_hashed(monkeypatch) -> list[int]:
    """Returns a list whose only item counts the files that are actually hashed."""
    count, file_digest = [0], digests.hashlib.file_digest

    def counting(*arguments):
        count[0] += 1
        return file_digest(*arguments)

    monkeypatch.setattr(digests.hashlib, "file_digest", counting)
    return count


def test_write_replaces_a_file_and_leaves_no_other(tmp_path):
    files.write(tmp_path / "new" / "note.txt", "größer")
    files.write(tmp_path / "new" / "note.txt", b"bytes")
    assert (tmp_path / "new" / "note.txt").read_bytes() == b"bytes"
    assert os.listdir(tmp_path / "new") == ["note.txt"]


def test_json_is_read_back_equal_including_infinity(tmp_path):
    value = {"loss": float("inf"), "name": "ß", "list": [1, None, True, 0.1 + 0.2]}
    files.write_json(tmp_path / "a.json", value)
    assert documents.read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_invalid_json_is_a_data_error_that_names_the_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(errors.DataError, match="a.json"):
        documents.read_json(tmp_path / "a.json")


def test_missing_files_and_unwritable_paths_are_storage_errors_of_one_paragraph(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for action in (
        lambda: documents.read_json(tmp_path / "missing.json"),
        lambda: sha256(tmp_path / "missing"),
        lambda: files.write(tmp_path / "file" / "below", b""),
        lambda: files.write(Path("/proc/nothing/can/be/made/here"), b""),
        lambda: Lock(tmp_path / "file" / "lock").__enter__(),
    ):
        with pytest.raises(errors.StorageError) as caught:
            action()
        assert "\n" not in str(caught.value) and ("missing" in str(caught.value) or "/" in str(caught.value))
        assert caught.value.code == 74


def test_a_write_that_fails_halfway_leaves_only_the_old_file(tmp_path):
    script = """
import resource, sys
from pathlib import Path
from trainer.core import documents, errors, files
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    files.write(path, b"n" * 5000)
except errors.StorageError as error:
    print(error)
"""
    files.write(tmp_path / "a", b"old")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")], capture_output=True, text=True, check=True
    )
    assert "too large" in done.stdout and str(tmp_path / "a") in done.stdout
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_replace_file_keeps_the_old_file_if_the_block_raises(tmp_path):
    files.write(tmp_path / "a", b"old")
    with pytest.raises(RuntimeError), files.replace_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_tensors_that_share_memory_or_are_not_contiguous_can_be_saved(tmp_path):
    import torch
    from safetensors.torch import load_file

    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "same": base,
        "row": base[1],
        "columns": base.T,
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(7),
    }
    folder = tmp_path / "readable by all"
    folder.mkdir()
    tensor_files.save_tensors(folder / "a.safetensors", tensors)
    loaded = load_file(folder / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
    (folder / "plain").touch()
    assert (folder / "a.safetensors").stat().st_mode == (folder / "plain").stat().st_mode


def test_a_failed_save_of_tensors_is_an_os_error_with_its_errno(tmp_path):
    import torch

    with pytest.raises(OSError) as caught:
        tensor_files.save_tensors(tmp_path / "no folder" / "a", {"a": torch.zeros(3)})
    assert caught.value.errno == errno.ENOENT


def test_sha256_matches_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "a") == Digests(tmp_path / "d.sqlite").sha256(tmp_path / "a") == expected


def test_digests_are_remembered_until_the_bytes_change(aged, tmp_path, monkeypatch):
    paths = [aged / str(number) for number in range(5)]
    hashed = count_hashed(monkeypatch)
    first = Digests(tmp_path / "d.sqlite")
    expected = [first.sha256(path) for path in paths]
    first.flush()
    assert hashed == [5]
    assert [Digests(tmp_path / "d.sqlite").sha256(path) for path in paths] == expected
    assert hashed == [5]
    assert [Digests(tmp_path / "d.sqlite", verify=True).sha256(path) for path in paths] == expected
    assert hashed == [10]

    # Other bytes under the same name, size and mtime are noticed by the ctime.
    status = paths[0].stat()
    paths[0].write_text("x")
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert paths[0].stat().st_mtime_ns == status.st_mtime_ns
    assert Digests(tmp_path / "d.sqlite").sha256(paths[0]) == sha256(paths[0]) != expected[0]


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    hashed = count_hashed(monkeypatch)
    database = Digests(tmp_path / "d.sqlite")
    database.sha256(tmp_path / "a")
    database.sha256(tmp_path / "a")
    assert hashed == [2]


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all", b"SQLite format 3\0" + bytes(84), "another table", "a folder"]
)
def test_a_damaged_database_is_ignored_and_files_hashed_again(aged, tmp_path, content):
    path = tmp_path / "d.sqlite"
    if content == "another table":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE digests (other INTEGER)")
    elif content == "a folder":
        path.mkdir()
    else:
        path.write_bytes(content)
    database = Digests(path)
    assert database.sha256(aged / "7") == sha256(aged / "7")
    database.flush()
    assert Digests(path).sha256(aged / "7") == sha256(aged / "7")


def test_four_processes_share_one_database_and_lose_no_row(aged, tmp_path):
    database = tmp_path / "new" / "d.sqlite"
    script = """
import sys
from pathlib import Path
from trainer.core.digests import Digests
sys.stdin.read()
for path in sys.argv[2:]:
    digests = Digests(Path(sys.argv[1]))
    digests.sha256(Path(path))
    digests.flush()
"""
    paths = [aged / str(number) for number in range(1, 8)]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(database), *map(str, paths[number : number + 4])], stdin=subprocess.PIPE
        )
        for number in range(4)
    ]
    for child in children:
        child.stdin.close()
    assert [child.wait() for child in children] == [0] * 4
    assert len(Digests(database)._known) == 7


def test_ten_thousand_remembered_files_are_looked_up_within_a_second(aged, tmp_path):
    name, state = digests._row_of((aged / "7").stat())
    with sqlite3.connect(tmp_path / "d.sqlite") as connection:
        connection.execute("CREATE TABLE digests (file TEXT PRIMARY KEY, state TEXT, sha256 TEXT) WITHOUT ROWID")
        connection.executemany(
            "INSERT INTO digests VALUES (?, ?, ?)", [(f"1:{number}", state, "0" * 64) for number in range(10_000)]
        )
        connection.execute("INSERT INTO digests VALUES (?, ?, ?)", (name, state, sha256(aged / "7")))
    start = time.perf_counter()
    database = Digests(tmp_path / "d.sqlite")
    for _ in range(10_000):
        database.sha256(aged / "7")
    assert time.perf_counter() - start < 1


OWNER = """
import os, sys, time
from pathlib import Path
from trainer.core import errors
from trainer.core.lock import Lock
try:
    with Lock(Path(sys.argv[1])):
        if "fork" in sys.argv and os.fork() == 0:
            os.write(1, f"child {os.getpid()}\\n".encode())
            time.sleep(60)
        os.write(1, f"owner {os.getpid()}\\n".encode())
        sys.stdin.read()
except errors.LockedError as error:
    print(error)
    sys.exit(error.code)
"""


def start_owner(path: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", OWNER, str(path), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_second_process_is_refused_with_the_owners_name_until_it_ends(tmp_path):
    path = tmp_path / "run" / "lock"
    owner = start_owner(path)
    pid = owner.stdout.readline().split()[1]
    start = time.perf_counter()
    second = start_owner(path)
    message = second.communicate(timeout=10)[0]
    assert second.returncode == 75 and time.perf_counter() - start < 2
    assert f"process {pid} on " in message and str(path.parent) in message and message.count("\n") == 1
    with pytest.raises(errors.LockedError, match=pid), Lock(path):
        pass
    owner.communicate(timeout=10)
    assert owner.returncode == 0
    with Lock(path), pytest.raises(errors.LockedError, match=str(os.getpid())), Lock(path):
        pass
    assert path.exists()


def test_the_lock_of_a_killed_owner_is_released_even_while_its_forked_worker_lives(tmp_path):
    path = tmp_path / "lock"
    owner = start_owner(path, "fork")
    pids = dict(owner.stdout.readline().split() for _ in range(2))
    try:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        os.kill(int(pids["child"]), 0)
        with Lock(path):
            assert f"process {os.getpid()} " in path.read_text()
    finally:
        os.kill(int(pids["child"]), signal.SIGKILL)
