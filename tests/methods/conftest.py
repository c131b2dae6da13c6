"""Runs of each method, made once in a process and read by many tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from lorica.methods.base import registry
from lorica.server.federation import Federation
from lorica.testing.checks import PARTICIPANTS, Recording, record
from lorica.testing.federation import Adapter, tiny_federation

REGISTRY = registry()
METHODS = sorted(REGISTRY)


@dataclass(frozen=True)
class History:
    """Three rounds of three clients, weighted by records.

    Attributes:
        folder: of the ledger.
        adapters: after each round.
    """

    folder: Path
    federation: Federation
    adapters: list[Adapter]


Recordings = Callable[..., Recording]
Histories = Callable[..., History]


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    """Method and participants a round -> its run, a third of a second when it is asked for first."""

    @cache
    def recorded(name: str, participants: int = PARTICIPANTS) -> Recording:
        return record(REGISTRY[name], tmp_path_factory.mktemp(name), participants=participants)

    return recorded


@pytest.fixture(scope="session")
def histories(tmp_path_factory: pytest.TempPathFactory) -> Histories:
    """Method, clients that the schedule of round 2 never had -> its run."""

    @cache
    def run(name: str, absent: tuple[int, ...] = ()) -> History:
        folder = tmp_path_factory.mktemp(name)
        some = tiny_federation(REGISTRY[name], folder, weighting="records")
        some.schedule[1] = [client for client in some.schedule[1] if client not in absent]
        adapters = []
        for _ in range(3):
            some.round()
            adapters.append(Adapter.of(some.server.model))
        return History(folder, some, adapters)

    return run
