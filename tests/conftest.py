"""Fixtures for all tests.

Tests use one thread, because results on a CPU are bit-identical only for the same number of threads.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from trainer.config.groups import GROUPS
from trainer.core.digests import Digests

if TYPE_CHECKING:
    from families import Tiny

pytest.register_assert_rewrite(
    "families",
    "parity",
    "program",
    "fault_table",
    "faults_checkpoints",
    "faults_environment",
    "faults_files",
    "faults_interruptions",
    "faults_training",
)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Returns the tiny checkpoint of a family by its name, which is written when it is first asked for."""
    import torch
    from families import Tiny

    torch.set_num_threads(1)
    return cache(lambda name: Tiny.save(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session", params=sorted(GROUPS["model"]))
def tiny(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Tiny]) -> Tiny:
    """A tiny checkpoint of each family in turn."""
    return tiny_checkpoint(request.param)


@pytest.fixture
def digests(tmp_path: Path) -> Digests:
    return Digests(tmp_path / "digests" / "digests.db")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a dataset, which does not exist yet."""
    return tmp_path / "set"
