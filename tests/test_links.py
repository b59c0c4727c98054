"""Links never lead a write or a deletion to another place; faults_environment.py has links in run folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.cache.store import Cache
from trainer.core import errors, files
from trainer.core.lock import Lock
from trainer.tracking.journal import Journal


@pytest.mark.parametrize("name", ["lock", "journal.jsonl"])
def test_a_link_that_appears_after_the_check_is_not_opened(tmp_path: Path, name: str):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(errors.StorageError, match="A link is in the place"):
        if name == "lock":
            Lock(tmp_path / "lock").__enter__()
        else:
            Journal(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(errors.StorageError):
        if name == "lock":
            Lock(tmp_path / "lock").__enter__()
        else:
            Journal(tmp_path)
    assert (tmp_path / "outside").read_text() == "mine"


def test_dropping_unused_entries_deletes_nothing_behind_a_link(tmp_path: Path):
    def entry_in(folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / f"{'a' * 64}.safetensors").write_text("mine")
        return folder / f"{'a' * 64}.safetensors"

    outside, unused = entry_in(tmp_path / "outside"), entry_in(tmp_path / "cache" / "text" / "aa")
    (tmp_path / "cache" / "latents").mkdir()
    (tmp_path / "cache" / "latents" / "aa").symlink_to(tmp_path / "outside")
    assert Cache(tmp_path / "cache", {}).drop_unused([]) == (1, 4)
    assert outside.exists() and not unused.exists()


def test_hidden_links_of_other_programs_are_no_reason_to_refuse_a_folder(tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / ".#note").symlink_to("somebody@host")
    files.check_plain(tmp_path)
    (tmp_path / "pictures" / "0.png").symlink_to("/etc/hostname")
    with pytest.raises(errors.StorageError, match="0.png is a link to /etc/hostname"):
        files.check_plain(tmp_path)
