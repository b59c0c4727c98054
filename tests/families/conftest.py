"""Fixtures for the tests of single families."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from families import Tiny, case_of
from trainer.model import Family


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Tiny]) -> Family:
    """The family of the test's file, with its tiny checkpoint and `Case.settings`."""
    name = request.module.__name__.rpartition(".")[2]
    return case_of(name).family(tiny_checkpoint(name))
