"""One run of each method, made once in a process and read by many tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from lorica.methods.base import registry
from lorica.testing.checks import PARTICIPANTS, Recording, record

METHODS = sorted(registry())
Recordings = Callable[..., Recording]


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    """Method and participants a round -> its run, a third of a second when it is asked for first."""

    @cache
    def recorded(name: str, participants: int = PARTICIPANTS) -> Recording:
        return record(name, tmp_path_factory.mktemp(name), participants=participants)

    return recorded
