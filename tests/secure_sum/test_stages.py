"""The stages as a whole: sums, dropouts at every stage, liars, and questions that no honest server asks."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lorica.errors import UserError
from lorica.secure_sum.setup import Setup, SummationError
from lorica.secure_sum.stages import Part, add_up, run_client_stage

SHAPES = {"a": (3, 4), "b": (5,)}
WEIGHTS = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}


def inputs(client: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(client)
    return {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}


class Clients:
    """Four clients in one process. `silent` is (stage, client) pairs that give no answer; `garbled` ones that lie."""

    def __init__(self, silent: set[tuple[str, int]] = frozenset(), garbled: set[tuple[str, int]] = frozenset()) -> None:  # type: ignore[assignment]
        self.silent, self.garbled = silent, garbled
        self.stored: dict[int, bytes] = {}
        self.asked: list[str] = []

    def ask(self, stage: str, questions: Mapping[int, str]) -> dict[int, bytes]:
        answers = {}
        for client, question in questions.items():
            self.asked.append(stage)
            if (stage, client) in self.silent:
                continue
            part = Part.from_bytes(self.stored[client]) if client in self.stored else Part()
            part, content = run_client_stage(part, client, question, lambda client=client: inputs(client))
            self.stored[client] = part.to_bytes()
            answers[client] = b"\x07" * len(content) if (stage, client) in self.garbled else content
        return answers


def setup(name: str = "one", threshold: int = 3) -> Setup:
    return Setup(name, len(WEIGHTS), threshold, 32, 5.0)


def expected(clients: list[int]) -> dict[str, Tensor]:
    return {name: sum(WEIGHTS[client] * inputs(client)[name].double() for client in clients) for name in SHAPES}  # type: ignore[misc]


def check(clients: list[int], total: Mapping[str, Tensor]) -> None:
    reference = expected(clients)
    assert total.keys() == reference.keys()
    for name, value in total.items():
        assert (value.double() - reference[name]).abs().max() <= len(clients) * setup().step / 2 + 1e-6


def test_the_sum_is_the_weighted_one() -> None:
    clients, total = add_up(setup(), WEIGHTS, SHAPES, Clients().ask)
    assert clients == [0, 1, 2, 3]
    check(clients, total)


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "revealed"])
@pytest.mark.parametrize("kind", ["silent", "garbled"])
def test_one_client_that_fails_at_any_stage_does_not_stop_the_others(stage: str, kind: str) -> None:
    clients, total = add_up(setup(), WEIGHTS, SHAPES, Clients(**{kind: {(stage, 2)}}).ask)
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
    assert add_up(setup(), WEIGHTS, SHAPES, clients.ask) == ([], {})
    if stage != "revealed":
        assert "revealed" not in clients.asked


def masked_once(clients: Clients, name: str = "one") -> dict[int, str]:
    """Runs the stages up to the masked input; returns every client's question of that stage."""
    questions: dict[int, str] = {}

    def ask(stage: str, asked: Mapping[int, str]) -> dict[int, bytes]:
        if stage == "masked":
            questions.update(asked)
        return clients.ask(stage, asked)

    add_up(setup(name), WEIGHTS, SHAPES, ask)
    return questions


def refused(clients: Clients, question: dict[str, object], match: str) -> None:
    before = clients.stored[0]
    with pytest.raises(SummationError, match=match):
        run_client_stage(Part.from_bytes(before), 0, json.dumps(question), lambda: inputs(0))


def test_what_no_honest_server_asks_is_refused() -> None:
    clients = Clients()
    question = json.loads(masked_once(clients)[0])
    refused(clients, {"stage": "keys", "setup": vars(setup())}, "the same summation twice")
    refused(clients, {"stage": "keys", "setup": vars(setup("two")) | {"threshold": 1}}, "question is malformed")
    refused(clients, question | {"weight": 1.5}, "not between 0 and 1")
    refused(clients, question | {"weight": float("nan")}, "not between 0 and 1")
    refused(clients, question | {"weight": 0.2}, "second input under the same masks")
    refused(clients, question | {"summation": "other"}, "has not joined")
    refused(clients, question | {"stage": "single"}, "unknown stage")
    refused(clients, {"stage": "revealed", "summation": "one", "survivors": [0, 1, 2]}, "second time")
    refused(clients, {"stage": "shares", "summation": "one"}, "question is malformed")
    refused(clients, {"hello": 1}, "question is malformed")
    for garbage in ("", "[]", "null", "{", "\x00"):
        with pytest.raises(SummationError):
            run_client_stage(Part.from_bytes(clients.stored[0]), 0, garbage, lambda: inputs(0))


def test_an_error_of_the_input_is_not_blamed_on_the_question() -> None:
    def full() -> dict[str, Tensor]:
        raise UserError("privacy.ledger", "ledger.sqlite", "the disk is full", "make room")

    clients = Clients(silent={("masked", 0)})
    question = masked_once(clients)[0]
    with pytest.raises(UserError, match="the disk is full"):
        run_client_stage(Part.from_bytes(clients.stored[0]), 0, question, full)


def test_the_same_input_in_a_second_sum_with_others_is_not_revealed(caplog: pytest.LogCaptureFixture) -> None:
    """Two sums that differ by one client would show its input."""
    clients = Clients()
    assert add_up(setup("one"), WEIGHTS, SHAPES, clients.ask)[0] == [0, 1, 2, 3]
    # A sum that is made again, after the server lost it, is the same sum.
    assert add_up(setup("again"), WEIGHTS, SHAPES, clients.ask)[0] == [0, 1, 2, 3]
    clients.silent = {("masked", 3)}
    assert add_up(setup("three"), WEIGHTS, SHAPES, clients.ask) == ([], {})
    clients.silent = set()
    assert add_up(setup("weights"), dict.fromkeys(WEIGHTS, 0.25), SHAPES, clients.ask) == ([], {})
    assert len([record for record in caplog.records if "second sum of the same input" in record.message]) == 2


def test_a_damaged_part_is_an_error() -> None:
    for content in (b"", b"{}", b"[]", b'{"state": "x", "given": null, "shown": null}'):
        with pytest.raises(SummationError, match="damaged"):
            Part.from_bytes(content)
