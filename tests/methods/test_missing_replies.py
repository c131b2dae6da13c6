"""A client that does not reply leaves the round, and the round is that of the others; for every registered method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorica.messages import Request
from lorica.methods.base import registry
from lorica.privacy.ledger import Ledger
from lorica.server.federation import Federation, TooFewReplies
from tests.methods.test_every_method import METHODS, ROUNDS, Wrapped, assert_same_model, federation, run
from tests.methods.test_pieces import ACCEPTED, PIECE, rarely

SEVERAL_EXCHANGES = {"deer", "fedask"}
REMEMBERING = {"client_ranks", "scaffold", "server_optimizer", "kalman", "average"}


class Losing(Wrapped):
    """An engine that loses some messages, given as (round, exchange, client): on the way out, or on the way back."""

    def __init__(self, engine: Any, lost: set[tuple[int, int, int]], late: bool = False) -> None:
        super().__init__(engine)
        self.lost, self.late = lost, late

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        gone = {client for client, r in requests.items() if (r.round, r.exchange, client) in self.lost}
        reached = requests if self.late else {c: request for c, request in requests.items() if c not in gone}
        return {client: reply for client, reply in self.engine.exchange(reached).items() if client not in gone}


def losing(
    name: str, folder: Path, lost: set[tuple[int, int, int]], late: bool = False, min_clients: int = 1, **more: Any
) -> Federation:
    some = federation(name, folder, weighting="records", **more)
    some.engine, some.min_clients = Losing(some.engine, lost, late), min_clients
    return some


def without(name: str, folder: Path, round_number: int, clients: set[int], **more: Any) -> Federation:
    """A federation whose schedule never had these clients in that round, on the same terms."""
    some = federation(name, folder, weighting="records", **more)
    some.schedule[round_number - 1] = [client for client in some.schedule[round_number - 1] if client not in clients]
    return some


@pytest.mark.parametrize("name", METHODS)
def test_a_round_without_a_client_is_the_round_that_never_had_it(name: str, tmp_path: Path) -> None:
    """Bit for bit, then and in all later rounds."""
    some = losing(name, tmp_path / "lost", {(2, 1, 1)})
    traffic = [some.round() for _ in range(ROUNDS)]
    assert [each.missing for each in traffic] == [[], [1], [], []]
    assert [each.participants for each in traffic] == [[0, 1, 2], [0, 2], [0, 1, 2], [0, 1, 2]]
    assert traffic[1].bytes_up[1] == 0 < traffic[1].bytes_down[1]
    assert_same_model(some, run(without(name, tmp_path / "absent", 2, {1})))


@pytest.mark.parametrize("name", METHODS)
def test_a_late_reply_changes_nothing_for_the_others(name: str, tmp_path: Path) -> None:
    """The client did the work and was charged. A model of its own has moved with it, so those compare until then."""
    rounds = 2 if registry()[name].personal else ROUNDS
    some = run(losing(name, tmp_path / "late", {(2, 1, 1)}, late=True), rounds)
    other = run(without(name, tmp_path / "absent", 2, {1}), rounds)
    if rounds == ROUNDS:
        assert_same_model(some, other)
    for key, value in some.server.model.tensors.items():
        assert torch.equal(value, other.server.model.tensors[key]), key
    ledger = Ledger(tmp_path / "late" / "ledger.sqlite")
    assert ledger.steps("run", 1) >= Ledger(tmp_path / "absent" / "ledger.sqlite").steps("run", 1) + 1
    assert ledger.steps("run", 1) <= some.plans[1].max_steps


@pytest.mark.parametrize("name", METHODS)
def test_whoever_was_missing_is_sent_everything_again(name: str, tmp_path: Path) -> None:
    some = losing(name, tmp_path, {(2, 1, 1)}, late=True)
    run(some, 2)
    engine = some.engine.engine
    count = len(engine.requests)
    before = dict(some.server.model.tensors)
    some.round()
    request = engine.requests[count][1]
    assert request.restart
    assert request.tensors.keys() == before.keys()
    assert request.increments.keys() == some.server.model.merged.keys() or not request.increments


def test_these_methods_have_several_exchanges_in_a_round(tmp_path: Path) -> None:
    counted = {name: run(federation(name, tmp_path / name), 1) for name in METHODS}
    assert {name for name, some in counted.items() if len(some.engine.requests) > 1} == SEVERAL_EXCHANGES


@pytest.mark.parametrize("name", sorted(SEVERAL_EXCHANGES))
def test_who_leaves_between_exchanges_is_asked_no_more_in_that_round(name: str, tmp_path: Path) -> None:
    some = losing(name, tmp_path, {(2, 2, 1)})
    some.round()
    engine = some.engine.engine
    count = len(engine.requests)
    traffic = some.round()
    assert (traffic.participants, traffic.missing) == ([0, 2], [1])
    asked = [sorted(requests) for requests in engine.requests[count:]]
    assert asked[0] == [0, 1, 2]
    assert all(clients == [0, 2] for clients in asked[1:])
    assert traffic.bytes_up[1] > 0
    assert some.round().participants == [0, 1, 2]


def test_fedask_forgets_who_left_between_its_sketches(tmp_path: Path) -> None:
    """A basis of three clients' mean product does not hold that of two: the round is as if the third had never come."""
    some = run(losing("fedask", tmp_path / "lost", {(2, 2, 1)}))
    other = run(without("fedask", tmp_path / "absent", 2, {1}))
    for key, value in some.server.model.tensors.items():
        assert torch.equal(value, other.server.model.tensors[key]), key


def test_each_half_of_a_deer_round_is_the_mean_of_those_that_replied_to_it(tmp_path: Path) -> None:
    some = losing("deer", tmp_path, {(1, 2, 1)})
    before = dict(some.server.model.tensors)
    some.round()
    first, second = some.engine.engine.replies
    records = {client: plan.records for client, plan in some.plans.items()}
    for site in some.server.model.sites:
        for name, replies in ((site.b, first), (site.a, second)):
            total = sum(records[client] for client in replies)
            mean = sum(records[client] / total * reply[name] for client, reply in replies.items())
            torch.testing.assert_close(some.server.model.tensors[name] - before[name], mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "piece"), rarely([pair for pair in ACCEPTED if pair[1] in REMEMBERING]))
def test_pieces_remember_only_who_took_part(name: str, piece: str, tmp_path: Path) -> None:
    """With ranks that differ, only the client of the smallest one is left."""
    gone = {0, 2} if piece == "client_ranks" else {1}
    make = PIECE[piece][1]
    some = run(losing(name, tmp_path / "lost", {(2, 1, client) for client in gone}, **make()), 3)
    other = run(without(name, tmp_path / "absent", 2, gone, **make()), 3)
    assert_same_model(some, other)
    for key, value in some.server.evaluated.items():
        assert torch.equal(value, other.server.evaluated[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_a_round_with_too_few_replies_stops_and_resumes_at_no_further_cost(name: str, tmp_path: Path) -> None:
    """The client is lost on the way back, in the round's last exchange: all had been charged."""
    whole = run(federation(name, tmp_path / "whole", weighting="records"))
    first = losing(name, tmp_path / "stopped", {(2, 2 if name in SEVERAL_EXCHANGES else 1, 1)}, late=True)
    first.min_clients = None
    first.round()
    state = (dict(first.server.model.tensors), dict(first.server.model.merged))
    method, server = first.method.state_dict(), first.server.state_dict()
    with pytest.raises(
        TooFewReplies, match=r"min_clients = None: round 2 needs 3 replies and has 2 \(client 1: no reply"
    ):
        first.round()
    rest = federation(name, tmp_path / "stopped", weighting="records")
    rest.method.load_state_dict(method)
    rest.server.model.assign(state[0])
    rest.server.model.merge(state[1])
    rest.server.load_state_dict(server)
    rest.server.round = 1
    run(rest, ROUNDS - 1)
    assert_same_model(whole, rest)
    ledger = Ledger(tmp_path / "stopped" / "ledger.sqlite")
    assert all(ledger.steps("run", number) == plan.max_steps for number, plan in rest.plans.items())


def test_min_clients_counts_those_that_are_left(tmp_path: Path) -> None:
    assert losing("ffa-lora", tmp_path / "a", {(1, 1, 1)}, min_clients=2).round().participants == [0, 2]
    with pytest.raises(TooFewReplies, match="needs 2 replies and has 1"):
        losing("ffa-lora", tmp_path / "b", {(1, 1, 1), (1, 1, 0)}, min_clients=2).round()
    with pytest.raises(TooFewReplies, match="needs 2 replies and has 1"):
        losing("deer", tmp_path / "c", {(1, 1, 1), (1, 2, 0)}, min_clients=2).round()


def test_replies_that_nobody_asked_for_are_left_alone(tmp_path: Path) -> None:
    some = federation("ffa-lora", tmp_path / "a")
    inner = some.engine

    class Talkative(Wrapped):
        def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
            replies = inner.exchange(requests)
            return replies | {7: replies[0]}

    some.engine = Talkative(inner)
    run(some)
    some.engine = inner
    assert_same_model(some, run(federation("ffa-lora", tmp_path / "b")))
