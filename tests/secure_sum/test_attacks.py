"""A hostile server, stage by stage: what it would need for a single reply, and what stops it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.identity import Identity
from lorica.secure_sum.messages import to_sign
from lorica.secure_sum.primitives import private_key, public_key
from lorica.secure_sum.requirements import Requirements
from lorica.secure_sum.setup import SummationError
from lorica.secure_sum.stages import Ask, Input, Part, add_up, run_client_stage
from tests.secure_sum.crowd import RUN, SHAPES, WEIGHTS, Clients, agreed, check, inputs, requirements

IDENTITIES = {client: Identity.new() for client in range(4)}
MEMBERS = {client: identity.public(f"clinic-{client}") for client, identity in IDENTITIES.items()}


def knowing(**changes: Any) -> Clients:
    """Clients that know each other's identity keys."""
    clients = Clients()
    clients.required = lambda own: requirements(own, members=MEMBERS, identity=IDENTITIES[own], **changes)
    return clients


Change = Callable[[str, int, dict[str, Any]], dict[str, Any]]


def through(clients: Clients, change: Change) -> Ask:
    """The server's questions, changed on the way: (stage, client, question) -> question."""

    def ask(stage: str, questions: Mapping[int, str]) -> dict[int, bytes]:
        changed = {client: change(stage, client, json.loads(question)) for client, question in questions.items()}
        return clients.ask(stage, {client: json.dumps(question) for client, question in changed.items()})

    return ask


# The server picks the weights.

VICTIM_ALONE = [[0, 1.0], [1, 0.0], [2, 0.0], [3, 0.0]]
VICTIM_ABOVE_ALL = [[0, 0.97], [1, 0.01], [2, 0.01], [3, 0.01]]


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (VICTIM_ALONE, "weight of client 1 is not in"),
        (VICTIM_ABOVE_ALL, "client 0: its share of the sum is 0.97, but this client allows at most 0.6"),
        ([[0, 0.61], [1, 0.13], [2, 0.13], [3, 0.13]], "its share of the sum is 0.61"),
        ([[0, 1.0], [1, 1e-300], [2, 1e-300], [3, 1e-300]], "its share of the sum is 1"),
        ([[0, 0.5], [1, 0.5], [2, -0.5], [3, 0.5]], "weight of client 2 is not in"),
        ([[0, 0.25], [1, 0.25], [2, 0.25], [3, 0.2]], "do not sum to 1"),
    ],
)
def test_no_client_takes_part_in_a_sum_that_one_client_dominates(weights: list[list[float]], problem: str) -> None:
    """The victim and the others refuse alike: nobody sends a key."""
    clients = Clients()
    total = add_up(agreed(), through(clients, lambda stage, client, asked: with_weights(asked, weights)))
    assert total == ([], {})
    assert set(clients.asked) == {"keys"}
    assert [refusal.split(":")[0] for refusal in clients.refusals] == ["0", "1", "2", "3"]
    assert all(problem in refusal for refusal in clients.refusals)


def with_weights(asked: dict[str, Any], weights: list[list[float]]) -> dict[str, Any]:
    return asked | {"agreement": asked["agreement"] | {"weights": weights}} if asked["stage"] == "keys" else asked


def test_the_default_limit_is_half_of_the_sum() -> None:
    clients = Clients()
    clients.required = lambda own: Requirements(RUN, own)
    assert add_up(agreed(weights={0: 0.5, 1: 0.25, 2: 0.25}), clients.ask)[0] == [0, 1, 2]
    assert add_up(agreed("more", (2, 1), {0: 0.51, 1: 0.25, 2: 0.24}), clients.ask) == ([], {})
    assert all("allows at most 0.5" in refusal for refusal in clients.refusals)


def test_who_is_told_another_vector_has_masks_that_fit_nobody() -> None:
    """Each vector is within everybody's limits; the victim's share is larger in the one that the others see."""
    told = {0: [[0, 0.1], [1, 0.3], [2, 0.3], [3, 0.3]]}
    other = [[0, 0.4], [1, 0.2], [2, 0.2], [3, 0.2]]
    clients = Clients()
    change = lambda stage, client, asked: with_weights(asked, told.get(client, other))  # noqa: E731
    assert add_up(agreed(weights=dict(map(tuple, other))), through(clients, change)) == ([], {})  # type: ignore[arg-type]
    assert "revealed" not in clients.asked
    assert any("its shares were altered, misrouted or malformed" in refusal for refusal in clients.refusals)


@pytest.mark.parametrize(
    "changes",
    [{"round": 2}, {"exchange": 2}, {"shapes": [["a", [12]], ["b", [5]]]}, {"bound": 1e-3}, {"threshold": 4}],
    ids=str,
)
def test_who_is_told_other_terms_has_masks_that_fit_nobody(changes: dict[str, Any]) -> None:
    def change(stage: str, client: int, asked: dict[str, Any]) -> dict[str, Any]:
        if stage != "keys" or client != 0:
            return asked
        agreement = asked["agreement"]
        setup = agreement["setup"] | {key: value for key, value in changes.items() if key in agreement["setup"]}
        rest = {key: value for key, value in changes.items() if key in agreement}
        return asked | {"agreement": agreement | rest | {"setup": setup}}

    clients = Clients()
    assert add_up(agreed(), through(clients, change)) == ([], {})
    assert "revealed" not in clients.asked


def test_terms_do_not_change_on_the_way() -> None:
    """A second opening under the same name is refused, and one under another name ends the first summation."""
    clients = Clients()
    asked = clients.masked_once(agreed(), stop={0})[0]
    again = agreed(bound=1e-3).plain()
    with pytest.raises(SummationError, match="the same summation twice"):
        clients.answered(0, {"stage": "keys", "agreement": again})
    clients.ask("keys", {0: json.dumps({"stage": "keys", "agreement": agreed("two", bound=1e-3).plain()})})
    with pytest.raises(SummationError, match="has not joined"):
        clients.answered(0, asked)
    with pytest.raises(SummationError, match="before this client shared its secrets"):
        clients.answered(0, asked | {"summation": "two"})


def test_fewer_members_than_the_owner_requires_are_refused() -> None:
    clients = Clients(min_clients=5)
    assert add_up(agreed(), clients.ask) == ([], {})
    assert "4 clients are members of the sum, but this client requires 5" in clients.refusals[0]
    clients = Clients()
    assert add_up(agreed(weights={0: 0.5, 1: 0.5}), clients.ask) == ([], {})
    assert "2 clients are members of the sum, but this client requires 3" in clients.refusals[0]


def test_fewer_survivors_than_the_owner_requires_get_no_shares() -> None:
    clients = Clients(silent={("masked", 3)}, min_clients=4)
    assert add_up(agreed(), clients.ask) == ([], {})
    assert all("3 clients survived, but this client requires 4" in refusal for refusal in clients.refusals)
    assert len(clients.refusals) == 3


def test_survivors_of_which_one_dominates_get_no_shares() -> None:
    """The server declares those to have dropped out that would hide client 3."""
    clients = Clients(max_share=0.5)
    weights = {0: 0.05, 1: 0.05, 2: 0.45, 3: 0.45}
    clients.silent = {("masked", 2)}
    assert add_up(agreed(weights=weights), clients.ask) == ([], {})
    assert all("client 3: its share of the sum is 0.818" in refusal for refusal in clients.refusals)
    assert len(clients.refusals) == 3


# A second sum, of which the difference is one client's.


def test_a_second_sum_after_another_one_does_not_give_a_client_away() -> None:
    """X over 0 to 3, another sum Y, then X without client 3."""
    clients = Clients()
    assert add_up(agreed("X"), clients.ask)[0] == [0, 1, 2, 3]
    assert add_up(agreed("Y", (2, 1)), clients.ask)[0] == [0, 1, 2, 3]
    clients.silent = {("masked", 3)}
    assert add_up(agreed("X again"), clients.ask) == ([], {})
    assert all("second sum of the same input" in refusal for refusal in clients.refusals)
    assert len(clients.refusals) == 3


EQUAL = dict.fromkeys(range(4), 0.25)


@pytest.mark.parametrize(
    "second",
    [
        agreed("weights", weights=EQUAL),
        # One share moved by less than a quantisation step would show, and by more than rounding does.
        agreed("a little", weights={0: 0.1 + 1e-9, 1: 0.2, 2: 0.3, 3: 0.4 - 1e-9}),
        # The sum of what is clipped elsewhere counts the clients whose coordinate lies between.
        agreed("bound", bound=0.5),
        agreed("three", weights={0: 0.2, 1: 0.3, 2: 0.5}),
    ],
    ids=lambda agreement: agreement.setup.summation,
)
def test_a_second_sum_of_the_same_input_under_other_terms_is_refused(second: Agreement) -> None:
    clients = Clients()
    assert add_up(agreed("first"), clients.ask)[0] == [0, 1, 2, 3]
    assert add_up(second, clients.ask) == ([], {})
    assert all("second sum of the same input" in refusal for refusal in clients.refusals)


def test_the_same_input_under_another_exchange_is_the_same_input() -> None:
    clients = Clients()
    assert add_up(agreed("first"), clients.ask)[0] == [0, 1, 2, 3]
    clients.given = lambda client: lambda agreement: Input(inputs(client))  # type: ignore[method-assign]
    assert add_up(agreed("second", (2, 3), EQUAL), clients.ask) == ([], {})
    assert all("second sum of the same input" in refusal for refusal in clients.refusals)


@pytest.mark.parametrize("order", ["release first", "projection first"])
def test_a_projection_is_summed_over_the_clients_of_the_sum_that_it_is_a_function_of(order: str) -> None:
    """FedASK's second sketch is a linear function of what the first one is a function of: the difference would be the
    missing client's.
    """
    places = [(1, 1), (1, 2)] if order == "release first" else [(1, 2), (1, 1)]
    clients = Clients()
    clients.derived = {(1, 2)}
    assert add_up(agreed("one", places[0]), clients.ask)[0] == [0, 1, 2, 3]
    clients.silent = {("masked", 3)}
    assert add_up(agreed("two", places[1]), clients.ask) == ([], {})
    assert all("a function of what was summed, with other clients" in refusal for refusal in clients.refusals)
    clients.silent = set()
    assert add_up(agreed("weights", places[1], EQUAL), clients.ask) == ([], {})
    names, total = add_up(agreed("three", places[1]), clients.ask)
    check(names, total, place=places[1])
    assert names == [0, 1, 2, 3]


def test_one_projection_a_round_is_summed() -> None:
    """With the size of the basis a server would choose where the next one is clipped, free of charge."""
    clients = Clients()
    clients.derived = {(1, 2), (1, 3)}
    assert add_up(agreed("one", (1, 2)), clients.ask)[0] == [0, 1, 2, 3]
    assert add_up(agreed("two", (1, 3)), clients.ask) == ([], {})
    assert all("a second function of what was summed in this round" in refusal for refusal in clients.refusals)


def test_other_rounds_and_releases_are_summed_over_whoever_is_there() -> None:
    clients = Clients()
    clients.derived = {(1, 2)}
    for place, silent in [
        ((1, 1), set()),
        ((1, 2), set()),
        ((2, 1), {("masked", 3)}),
        ((2, 2), set()),
        ((3, 1), set()),
    ]:
        clients.silent = silent
        names, total = add_up(agreed(str(place), place), clients.ask)
        assert names == [0, 1, 2] if silent else [0, 1, 2, 3]
        check(names, total, place=place)


# Invented members and swapped keys.


def sybils(clients: Clients, victim: int, members: list[int]) -> tuple[list[int], dict[str, Tensor]]:
    """The server plays all members but the victim, with inputs of zero."""
    played = {member: Part() for member in members if member != victim}
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}

    def ask(stage: str, questions: Mapping[int, str]) -> dict[int, bytes]:
        answers = clients.ask(stage, {own: question for own, question in questions.items() if own == victim})
        for member in questions.keys() & played.keys():
            played[member], answers[member] = run_client_stage(
                played[member], requirements(member), questions[member], lambda agreement: Input(zeros)
            )
        return answers

    return add_up(agreed(weights=dict.fromkeys(members, 1 / len(members))), ask)


def test_without_members_a_server_that_invents_clients_reads_a_reply() -> None:
    """What docs/federation.md says is not protected."""
    names, total = sybils(Clients(), 0, [0, 10, 11, 12])
    assert names == [0, 10, 11, 12]
    for name, value in total.items():
        assert torch.allclose(4 * value, inputs(0)[name], atol=1e-5)


def test_invented_members_do_not_count() -> None:
    clients = knowing()
    names, total = sybils(clients, 0, [0, 10, 11, 12])
    assert (names, float(total["a"].abs().max())) == ([10, 11, 12], 0.0)
    assert clients.refusals == [
        "0: secure summation: client 10: it is not listed under `members` in this client's policy"
    ]


def test_members_whose_keys_the_server_made_are_refused_by_name() -> None:
    """The server takes the places of listed owners, which it has not got the identity keys of."""
    clients = knowing()
    names, total = sybils(clients, 0, [0, 1, 2, 3])
    assert (names, float(total["a"].abs().max())) == ([1, 2, 3], 0.0)
    line = str(MEMBERS[1])
    assert clients.refusals == [
        f"0: secure summation: client 1: its public keys are not signed; the policy lists {line} for it"
    ]


def test_members_that_know_each_other_add_up() -> None:
    clients = knowing()
    names, total = add_up(agreed(), clients.ask)
    assert names == [0, 1, 2, 3]
    check(names, total)


def swapped(clients: Clients, signed_by: Identity | None, for_terms: Agreement | None = None) -> list[str]:
    """The server puts keys of its own in the place of client 2's; returns what client 0 refuses."""
    own = public_key(private_key()) + public_key(private_key())
    if signed_by is not None:
        own += signed_by.sign(to_sign(for_terms or agreed(), 2, own))

    def change(stage: str, client: int, asked: dict[str, Any]) -> dict[str, Any]:
        if stage == "shares" and client != 2:
            asked["keys"]["2"] = own.hex()
        return asked

    assert add_up(agreed(), through(clients, change)) == ([], {})
    assert "masked" not in clients.asked
    return [refusal for refusal in clients.refusals if refusal.startswith("0:")]


def test_swapped_keys_are_refused_by_name() -> None:
    (refusal,) = swapped(knowing(), None)
    assert "client 2: its public keys are not signed; the policy lists" in refusal
    assert "clinic-2" in refusal
    for stranger in (Identity.new(), IDENTITIES[1]):
        (refusal,) = swapped(knowing(), stranger)
        assert "client 2: its public keys are not signed for this sum by ed25519:" in refusal


@pytest.mark.parametrize(
    "terms",
    [agreed("another"), agreed(place=(2, 1)), agreed(place=(1, 2)), agreed(weights=EQUAL), agreed(bound=1.0)],
    ids=["summation", "round", "exchange", "weights", "setup"],
)
def test_keys_that_were_signed_for_other_terms_are_refused(terms: Agreement) -> None:
    (refusal,) = swapped(knowing(), IDENTITIES[2], terms)
    assert "client 2: its public keys are not signed for this sum" in refusal


def test_a_member_without_an_identity_is_named() -> None:
    clients = knowing()
    known = clients.required
    clients.required = lambda own: requirements(own) if own == 2 else known(own)
    assert add_up(agreed(), clients.ask) == ([], {})
    assert all("client 2: its public keys are not signed" in refusal for refusal in clients.refusals[:2])


def test_an_owner_that_changes_its_list_meanwhile_is_heard() -> None:
    clients = knowing()
    opening = json.dumps({"stage": "keys", "agreement": agreed().plain()})
    keys = clients.ask("keys", dict.fromkeys(WEIGHTS, opening))
    fewer = {client: member for client, member in MEMBERS.items() if client != 3}
    clients.required = lambda own: requirements(own, members=fewer, identity=IDENTITIES[own])
    hexed = {client: content.hex() for client, content in keys.items()}
    with pytest.raises(SummationError, match="client 3: it is not listed under `members`"):
        clients.answered(0, {"stage": "shares", "summation": "one", "keys": hexed})


# Messages of one sum in another.


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "revealed"])
@pytest.mark.parametrize("signed", [True, False])
def test_answers_of_an_earlier_round_are_of_no_use_in_a_later_one(stage: str, signed: bool) -> None:
    clients = knowing() if signed else Clients()
    recorded: dict[tuple[str, int], bytes] = {}

    def record(asked: str, questions: Mapping[int, str]) -> dict[int, bytes]:
        answers = clients.ask(asked, questions)
        recorded.update({(asked, client): content for client, content in answers.items()})
        return answers

    def replay(asked: str, questions: Mapping[int, str]) -> dict[int, bytes]:
        answers = clients.ask(asked, questions)
        return answers | ({2: recorded[asked, 2]} if asked == stage else {})

    assert add_up(agreed("one"), record)[0] == [0, 1, 2, 3]
    names, total = add_up(agreed("two", (2, 1)), replay)
    if names:
        check(names, total, place=(2, 1))
        # It goes on only with keys of its own, and its old input is none of this sum.
        assert names == ([0, 1, 2, 3] if stage == "revealed" else [0, 1, 3])
    assert bool(names) or stage in ("keys", "shares", "revealed")


def test_questions_of_an_earlier_round_are_refused_in_a_later_one() -> None:
    clients = Clients()
    old: list[tuple[int, str]] = []

    def record(stage: str, questions: Mapping[int, str]) -> dict[int, bytes]:
        old.extend(questions.items())
        return clients.ask(stage, questions)

    assert add_up(agreed("one"), record)[0] == [0, 1, 2, 3]
    asked: list[str] = []

    def later(stage: str, questions: Mapping[int, str]) -> dict[int, bytes]:
        answers = clients.ask(stage, questions)
        for client, question in old:
            if json.loads(question)["stage"] != "keys":
                with pytest.raises(SummationError, match="has not joined"):
                    clients.answered(client, question)
                asked.append(stage)
        return answers

    names, total = add_up(agreed("two", (2, 1)), later)
    assert names == [0, 1, 2, 3]
    check(names, total, place=(2, 1))
    assert len(asked) == 4 * 12


def test_an_opening_that_is_repeated_makes_fresh_keys() -> None:
    """Two openings of one agreement, another one between them: no key is used twice, so no mask is either."""
    clients = Clients()
    opening = json.dumps({"stage": "keys", "agreement": agreed().plain()})
    other = json.dumps({"stage": "keys", "agreement": agreed("other", (2, 1)).plain()})
    sent = [clients.ask("keys", {0: question})[0] for question in (opening, other, opening)]
    parts = [np.frombuffer(content, np.uint8).reshape(2, 32) for content in sent]
    assert len({bytes(key) for part in parts for key in part}) == 6
