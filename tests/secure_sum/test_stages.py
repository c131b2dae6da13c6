"""The stages as a whole: sums, dropouts at every stage, liars, and questions that no honest server asks."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lorica.errors import UserError
from lorica.secure_sum.setup import SummationError
from lorica.secure_sum.stages import Input, Part, add_up, run_client_stage
from tests.secure_sum.crowd import SHAPES, WEIGHTS, Clients, agreed, check, inputs, requirements


def test_the_sum_is_the_weighted_one() -> None:
    clients, total = add_up(agreed(), Clients().ask)
    assert clients == [0, 1, 2, 3]
    check(clients, total)


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "revealed"])
@pytest.mark.parametrize("kind", ["silent", "garbled"])
def test_one_client_that_fails_at_any_stage_does_not_stop_the_others(stage: str, kind: str) -> None:
    clients, total = add_up(agreed(), Clients(**{kind: {(stage, 2)}}).ask)
    if (stage, kind) == ("keys", "garbled"):
        # Its own keys were replaced on the way: it refuses to go on.
        assert clients in ([], [0, 1, 3])
    elif (stage, kind) == ("revealed", "garbled"):
        # Well-formed but wrong shares end the sum: nobody can say whose they are.
        assert clients in ([], [0, 1, 2, 3])
    else:
        # Once its masked input has arrived, a client is in the sum whether or not it stays.
        assert clients == ([0, 1, 2, 3] if stage == "revealed" else [0, 1, 3])
    if clients:
        check(clients, total)


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "revealed"])
def test_below_the_threshold_there_is_no_sum(stage: str) -> None:
    clients = Clients(silent={(stage, 1), (stage, 2)})
    assert add_up(agreed(), clients.ask) == ([], {})
    if stage != "revealed":
        assert "revealed" not in clients.asked


def refused(clients: Clients, question: dict[str, object], match: str) -> None:
    with pytest.raises(SummationError, match=match):
        run_client_stage(clients.part(0), requirements(0), json.dumps(question), lambda agreement: Input(inputs(0)))


def with_setup(plain: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return plain | {"setup": plain["setup"] | changes}


def test_what_no_honest_server_asks_is_refused() -> None:
    clients = Clients()
    question = clients.masked_once(agreed())[0]
    plain = agreed("two").plain()
    refused(clients, {"stage": "keys", "agreement": agreed().plain()}, "the same summation twice")
    for wrong, problem in [
        (with_setup(plain, threshold=1), "terms are invalid: threshold"),
        (with_setup(plain, clients=5), "terms are invalid: clients"),
        (with_setup(plain, bits=32.0), "malformed"),
        (with_setup(plain, more=1), "malformed"),
        (plain | {"more": 1}, "malformed"),
        (plain | {"round": "1"}, "malformed"),
        (plain | {"weights": [*plain["weights"][:3], plain["weights"][2]]}, "terms are invalid: clients"),
        (plain | {"weights": plain["weights"][::-1]}, "malformed"),
        (plain | {"weights": [[client, float("nan")] for client in range(4)]}, "weight of client 0 is not in"),
        (plain | {"weights": [[client, 0.3] for client in range(4)]}, "they do not sum to 1"),
        (plain | {"run": "other"}, "the sum is of run 'other'"),
        ([], "malformed"),
        (None, "malformed"),
    ]:
        refused(clients, {"stage": "keys", "agreement": wrong}, problem)
    refused(clients, question | {"summation": "other"}, "has not joined")
    refused(clients, question | {"stage": "single"}, "unknown stage")
    refused(clients, {"stage": "revealed", "summation": "one", "survivors": [0, 1, 2]}, "second time")
    refused(clients, {"stage": "revealed", "summation": "one", "survivors": "0123"}, "malformed")
    refused(clients, {"stage": "shares", "summation": "one"}, "malformed")
    refused(clients, {"hello": 1}, "malformed")
    for garbage in ("", "[]", "null", "{", "\x00"):
        with pytest.raises(SummationError):
            run_client_stage(clients.part(0), requirements(0), garbage, lambda agreement: Input(inputs(0)))


def test_no_later_stage_changes_the_share() -> None:
    """What a stage after the first says of weights is not read."""
    clients = Clients()
    question = clients.masked_once(agreed(), stop={0})[0]
    assert clients.answered(0, question | {"weight": 1.0, "weights": [[0, 1.0]]}) == clients.answered(0, question)


def test_an_error_of_the_input_is_not_blamed_on_the_question() -> None:
    def full(agreement: object) -> Input:
        raise UserError("privacy.ledger", "ledger.sqlite", "the disk is full", "make room")

    clients = Clients()
    question = clients.masked_once(agreed(), stop={0})[0]
    with pytest.raises(UserError, match="the disk is full"):
        run_client_stage(clients.part(0), requirements(0), json.dumps(question), full)


def test_a_sum_that_was_lost_is_made_again_and_is_the_same() -> None:
    clients = Clients()
    first = add_up(agreed("one"), clients.ask)
    again = add_up(agreed("again"), clients.ask)
    assert first[0] == again[0] == [0, 1, 2, 3]
    assert all(torch.equal(first[1][name], again[1][name]) for name in SHAPES)


def test_a_sum_that_a_client_missed_is_made_again_without_it() -> None:
    """The server forgot a sum over three of four, and starts anew with these three: at the same relative shares."""
    clients = Clients(silent={("masked", 3)})
    assert add_up(agreed("one"), clients.ask)[0] == [0, 1, 2]
    weights = {client: WEIGHTS[client] / sum(WEIGHTS[one] for one in range(3)) for client in range(3)}
    grown = max(weights.values()) / max(WEIGHTS[client] for client in range(3))
    names, total = add_up(agreed("again", weights=weights, bound=5.0 * grown), clients.ask)
    assert names == [0, 1, 2]
    check(names, {name: value / grown for name, value in total.items()})


def test_a_damaged_part_is_an_error() -> None:
    for content in (b"", b"{}", b"[]", b'{"version": 2, "state": "x", "given": null, "shown": []}'):
        with pytest.raises(SummationError, match="damaged"):
            Part.from_bytes(content)


def test_a_part_of_an_earlier_version_is_named_as_such() -> None:
    with pytest.raises(SummationError, match="written by another version of Lorica; finish the run with that version"):
        Part.from_bytes(b'{"state": null, "given": ["00", 0.5], "shown": null}')


def test_parts_go_through_bytes() -> None:
    clients = Clients()
    add_up(agreed(), clients.ask)
    part = clients.part(0)
    assert Part.from_bytes(part.to_bytes()) == part
    assert list(part.shown) == [(1, 1)]
