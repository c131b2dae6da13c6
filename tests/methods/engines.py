"""Engines around other ones, and when two federations are the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorica.messages import Request
from lorica.server.federation import Federation


class Wrapped:
    """An engine around another one; what it does not do itself, that one does."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class Losing(Wrapped):
    """An engine that loses some messages, given as (round, exchange, client): on the way out, or on the way back."""

    def __init__(self, engine: Any, lost: set[tuple[int, int, int]], late: bool = False) -> None:
        super().__init__(engine)
        self.lost, self.late = lost, late

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        gone = {client for client, r in requests.items() if (r.round, r.exchange, client) in self.lost}
        reached = requests if self.late else {c: request for c, request in requests.items() if c not in gone}
        return {client: reply for client, reply in self.engine.exchange(reached).items() if client not in gone}


def assert_same_model(one: Federation, other: Federation) -> None:
    """Bit for bit: tensors, what was merged, and what clients keep."""
    for key, value in one.server.model.tensors.items():
        assert torch.equal(value, other.server.model.tensors[key]), key
    assert one.server.model.merged.keys() == other.server.model.merged.keys()
    for key, pair in one.server.model.merged.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, other.server.model.merged[key], strict=True)), key
    for number, client in one.engine.clients.items():
        mine, theirs = client.personal("run"), other.engine.clients[number].personal("run")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
