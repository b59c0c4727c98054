"""What all tests share. One thread: CPU results are bit-equal for a fixed number of threads only."""

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


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A family's tiny checkpoint, and the settings (key=value) that load it."""

    name: str
    settings: list[str]

    def family(self) -> Family:
        """The family with those of its settings that are its own."""
        values = dict(
            setting.removeprefix("model.").split("=", 1) for setting in self.settings if setting.startswith("model.")
        )
        kind = GROUPS["model"][self.name]
        types = {field.name: field.type for field in dataclasses.fields(kind)}
        return kind(**{name: int(value) if types[name] == "int" else value for name, value in values.items()})


@pytest.fixture(scope="session", params=sorted(GROUPS["model"]))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Each family in turn."""
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
