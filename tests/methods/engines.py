"""What tests of federations share: engines around other ones, changed replies, equality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lorica.messages import Request
from lorica.server.federation import Federation
from lorica.server.reply_checks import Expected, check_reply, expected_reply
from lorica.testing.federation import Adapter, RecordingEngine


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


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def times(factor: float) -> Change:
    return lambda reply: {name: factor * value for name, value in reply.items()}


def checked(some: Federation, client: int = 1) -> Iterator[tuple[Request, dict[str, Tensor], Expected]]:
    """What a client of a recorded run was asked, what it replied, and what the server expected of it."""
    engine, earlier = some.engine, None
    assert isinstance(engine, RecordingEngine)
    for model, requests, replies in zip(engine.models, engine.requests, engine.replies, strict=True):
        if client in requests:
            records = some.plans[client].records
            earlier = expected_reply(requests[client], records, model.tensors, some.server.seed, earlier)
            yield requests[client], replies[client], earlier


def assert_honest_pass_and_large_do_not(some: Federation, factor: float, client: int = 1) -> None:
    """Of every exchange of a recorded run."""
    found = list(checked(some, client))
    assert found
    for request, reply, expected in found:
        assert check_reply(reply, expected) is None
        wrong = check_reply(times(factor)(reply), expected)
        assert wrong is not None, f"round {request.round}, exchange {request.exchange}"
        assert "steps allow at most" in wrong or "AdamW" in wrong


def assert_same_adapter(one: Adapter, other: Adapter) -> None:
    """Bit for bit: tensors, and what was merged."""
    for key, value in one.tensors.items():
        assert torch.equal(value, other.tensors[key]), key
    assert one.merged.keys() == other.merged.keys()
    for key, pair in one.merged.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, other.merged[key], strict=True)), key


def assert_same_model(one: Federation, other: Federation) -> None:
    """The adapters, and what clients keep, bit for bit."""
    assert_same_adapter(Adapter.of(one.server.model), Adapter.of(other.server.model))
    for number, client in one.engine.clients.items():
        mine, theirs = (each.personal("run", one.server.round) for each in (client, other.engine.clients[number]))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
