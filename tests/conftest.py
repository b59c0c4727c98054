"""Fixtures for all tests.

Tests use one thread, because results on a CPU are bit-identical only for the same number of threads.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import dataclasses
from pathlib import Path

import pytest

from trainer.config.groups import GROUPS
from trainer.core.digests import Digests
from trainer.model import Family

pytest.register_assert_rewrite(
    "program",
    "fault_table",
    "faults_checkpoints",
    "faults_environment",
    "faults_files",
    "faults_interruptions",
    "faults_training",
)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint of a model family."""

    name: str
    """Name of the family in the config group `model`."""
    settings: list[str]
    """Overrides (key=value) that select the checkpoint."""

    def family(self) -> Family:
        """Returns the family with its own settings; those of other groups are left out."""
        values = dict(
            setting.removeprefix("model.").split("=", 1) for setting in self.settings if setting.startswith("model.")
        )
        settings_class = GROUPS["model"][self.name]
        types = {field.name: field.type for field in dataclasses.fields(settings_class)}
        return settings_class(**{name: int(value) if types[name] == "int" else value for name, value in values.items()})


@pytest.fixture(scope="session", params=sorted(GROUPS["model"]))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny checkpoint of each family in turn."""
    import torch

    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp(request.param)
    return Tiny(request.param, GROUPS["model"][request.param].save_tiny_checkpoint(folder))


@pytest.fixture
def digests(tmp_path: Path) -> Digests:
    return Digests(tmp_path / "digests" / "digests.db")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a dataset, which does not exist yet."""
    return tmp_path / "set"
