"""What a client refuses a server, and what either refuses of another client, with the blame where it belongs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorica.errors import UserError
from lorica.secure_sum import client, server
from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.client import State
from lorica.secure_sum.messages import DIGEST_BYTES, SEALED_BYTES, check_keys
from lorica.secure_sum.setup import Setup, SummationError
from lorica.secure_sum.shamir import SHARE_BYTES, P
from tests.secure_sum.parties import (
    Parties,
    agreement_for,
    lenient,
    masked,
    plain_sum,
    random_inputs,
    revealed,
    shared,
    stored,
)

CLIENTS = range(5)
INPUTS = random_inputs(CLIENTS)


@pytest.fixture
def parties() -> Parties:
    """Five clients, threshold 3, after stage 2."""
    return shared(agreement_for(CLIENTS, 3))


def refused(problem: str, blamed: int | None, function: Callable, *arguments: object) -> None:
    with pytest.raises(SummationError, match=problem) as error:
        function(*arguments)
    assert error.value.client == blamed


def flipped(content: bytes, index: int) -> bytes:
    return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]


# Stage 2: what a client refuses of the public keys.


def advertised() -> tuple[State, dict[int, bytes]]:
    agreement = agreement_for(CLIENTS, 3)
    states, keys = zip(*(client.advertise(agreement, lenient(own)) for own in CLIENTS), strict=True)
    return states[0], dict(enumerate(keys))


def test_too_few_keys_are_refused_by_both_sides() -> None:
    state, keys = advertised()
    few = {own: keys[own] for own in (0, 1)}
    refused("2 clients sent keys, but the threshold is 3", None, client.share, state, few, lenient(0))
    refused("2 clients sent keys, but the threshold is 3", None, check_keys, state.agreement, few)


def test_keys_of_those_that_are_no_members_are_refused() -> None:
    state, keys = advertised()
    invented = client.advertise(agreement_for([*CLIENTS, 5]), lenient(5))[1]
    refused("not a member of the sum", 5, client.share, state, keys | {5: invented}, lenient(0))
    swapped = {own: keys[own] for own in range(4)} | {5: invented}
    refused("not a member of the sum", 5, client.share, state, swapped, lenient(0))


@pytest.mark.parametrize("wrong", [b"", bytes(range(63)), bytes(range(65))])
def test_keys_of_the_wrong_length_are_refused(wrong: bytes) -> None:
    state, keys = advertised()
    refused("its public keys have .* bytes", 3, client.share, state, keys | {3: wrong}, lenient(0))


@pytest.mark.parametrize("own", [-1, 2**63])
def test_ids_out_of_range_are_refused(own: int) -> None:
    with pytest.raises(UserError, match="the id is not between"):
        agreement_for([0, 1, 2, own])


def test_a_key_that_two_clients_have_is_refused() -> None:
    state, keys = advertised()
    refused("appears twice", 3, client.share, state, keys | {3: keys[2]}, lenient(0))
    refused("appears twice", 3, client.share, state, keys | {3: keys[3][:32] + keys[2][32:]}, lenient(0))
    refused("appears twice", 3, client.share, state, keys | {3: keys[3][:32] * 2}, lenient(0))


def test_a_server_that_replaces_a_clients_own_keys_is_refused() -> None:
    state, keys = advertised()
    other = client.advertise(state.agreement, lenient(0))[1]
    refused("missing or replaced", None, client.share, state, keys | {0: other}, lenient(0))
    refused("missing or replaced", None, client.share, state, {own: keys[own] for own in range(1, 5)}, lenient(0))


def test_a_key_of_small_order_is_refused_in_either_place() -> None:
    state, keys = advertised()
    refused("not a usable X25519 key", 3, client.share, state, keys | {3: bytes(32) + keys[3][32:]}, lenient(0))
    agreement = state.agreement
    pairs = {own: client.advertise(agreement, lenient(own)) for own in CLIENTS}
    keys = {own: message for own, (_, message) in pairs.items()}
    # A client that can open its shares, but has a mask key that no mask can be agreed on with.
    keys[3] = keys[3][:32] + bytes(32)
    states, sent = {}, {}
    for own in (0, 1, 2, 4):
        states[own], sent[own] = client.share(pairs[own][0], keys, lenient(own))
    sealing = replace(pairs[3][0], keys=keys)
    message = client.primitives.seal(client._encryption(sealing, 0, keys), bytes(66), agreement.digest, 3, 0)
    shares = {own: sent[own][0] for own in (1, 2, 4)} | {3: message}
    refused("not a usable X25519 key", 3, client.mask, states[0], shares, INPUTS[0])


def test_secrets_are_shared_once(parties: Parties) -> None:
    refused("twice", None, client.share, parties.states[0], parties.keys, lenient(0))


# Routing.


def sent_shares() -> tuple[Agreement, dict[int, bytes], dict[int, dict[int, bytes]]]:
    agreement = agreement_for(CLIENTS, 3)
    pairs = {own: client.advertise(agreement, lenient(own)) for own in CLIENTS}
    keys = {own: message for own, (_, message) in pairs.items()}
    return agreement, keys, {own: client.share(state, keys, lenient(own))[1] for own, (state, _) in pairs.items()}


def test_shares_that_are_not_for_exactly_the_others_are_not_routed() -> None:
    agreement, keys, sent = sent_shares()
    message = sent[2][0]
    for wrong in ({}, sent[2] | {2: message}, sent[2] | {9: message}, {0: message}):
        refused("not for exactly the other clients", 2, server.route, agreement, keys, sent | {2: wrong})
    refused("sent shares but no keys", 9, server.route, agreement, keys, sent | {9: sent[2]})


def test_the_shares_of_too_few_clients_are_not_routed() -> None:
    agreement, keys, sent = sent_shares()
    few = {own: sent[own] for own in (0, 1)}
    refused("2 clients shared their secrets, but the threshold is 3", None, server.route, agreement, keys, few)


@pytest.mark.parametrize("length", [0, SEALED_BYTES - 1, SEALED_BYTES + 1])
def test_shares_of_the_wrong_length_are_not_routed(length: int) -> None:
    agreement, keys, sent = sent_shares()
    refused(f"not {SEALED_BYTES} bytes", 2, server.route, agreement, keys, sent | {2: sent[2] | {0: bytes(length)}})


# Stage 3: what a client refuses of the others' shares.


@pytest.mark.parametrize("index", [0, 11, 12, 40, SEALED_BYTES - 1])
def test_an_altered_share_is_refused(parties: Parties, index: int) -> None:
    shares = parties.routed[0]
    altered = shares | {3: flipped(shares[3], index)}
    refused("altered, misrouted or malformed", 3, client.mask, parties.states[0], altered, INPUTS[0])


def test_a_misrouted_share_is_refused(parties: Parties) -> None:
    """Meant for another recipient, from another sender, back to its sender, or of another summation."""
    shares = parties.routed[0]
    agreement = parties.agreement
    elsewhere = shared(replace(agreement, setup=replace(agreement.setup, summation="another")))
    for wrong in (parties.routed[1][3], shares[2], parties.routed[3][0], elsewhere.routed[0][3], b""):
        misrouted = shares | {3: wrong}
        refused("altered, misrouted or malformed", 3, client.mask, parties.states[0], misrouted, INPUTS[0])


def test_a_share_of_the_same_keys_under_another_id_of_summation_is_refused() -> None:
    """The id is authenticated by itself: not only through keys that are fresh in each summation."""
    state, keys = advertised()
    other = client.advertise(state.agreement, lenient(1))
    keys |= {1: other[1]}
    setup = replace(state.agreement.setup, summation="another")
    renamed = replace(state, agreement=replace(state.agreement, setup=setup))
    message = client.share(other[0], keys, lenient(1))[1][0]
    after, _ = client.share(renamed, keys, lenient(0))
    refused("altered", 1, client.mask, after, {1: message, 2: message}, INPUTS[0])


@pytest.mark.parametrize("pair", [bytes(65), bytes(67), P.to_bytes(33, "big") * 2, bytes(33) + b"\xff" * 33])
def test_shares_outside_the_field_are_refused_although_authentic(parties: Parties, pair: bytes) -> None:
    state = parties.states[3]
    key = client._encryption(state, 0, parties.keys)
    message = client.primitives.seal(key, pair, parties.agreement.digest, 3, 0)
    shares = parties.routed[0] | {3: message}
    refused("altered, misrouted or malformed", 3, client.mask, parties.states[0], shares, INPUTS[0])


def test_unknown_senders_are_refused(parties: Parties) -> None:
    shares = parties.routed[0]
    refused("from unknown clients", None, client.mask, parties.states[0], shares | {9: shares[1]}, INPUTS[0])
    refused("from unknown clients", None, client.mask, parties.states[0], shares | {0: shares[1]}, INPUTS[0])


def test_too_few_sharers_are_refused(parties: Parties) -> None:
    one = {1: parties.routed[0][1]}
    refused("2 clients shared their secrets", None, client.mask, parties.states[0], one, INPUTS[0])


def test_an_input_before_sharing_is_refused() -> None:
    state, _ = advertised()
    refused("before this client shared", None, client.mask, state, {}, INPUTS[0])


def test_a_second_input_under_the_same_masks_is_refused_and_the_same_one_gives_the_same_bytes(
    parties: Parties,
) -> None:
    shares = parties.routed[0]
    state, reply = client.mask(parties.states[0], shares, INPUTS[0])
    again, same = client.mask(stored(state), shares, INPUTS[0])
    assert (again, same) == (state, reply)
    moved = INPUTS[0] | {"a": INPUTS[0]["a"] + 2.0**-10}
    renamed = {"c": INPUTS[0]["a"], "b": INPUTS[0]["b"]}
    reshaped = INPUTS[0] | {"b": INPUTS[0]["b"].reshape(3, 2)}
    refused("second input", None, client.mask, stored(state), shares, moved)
    for other in (renamed, reshaped, {}):
        refused("other tensors than it announced", None, client.mask, stored(state), shares, other)
    fewer = {sender: shares[sender] for sender in (1, 2, 3)}
    refused("second input", None, client.mask, stored(state), fewer, INPUTS[0])
    # Neither does an answer to the next stage open the way.
    state, _ = client.reveal(state, list(CLIENTS), lenient(0))
    refused("second input", None, client.mask, stored(state), shares, moved)


# Stage 4: what a client refuses of the list of survivors.


@pytest.fixture
def answered(parties: Parties) -> tuple[Parties, dict[int, bytes]]:
    return parties, masked(parties, INPUTS)


def test_lists_of_survivors_that_a_client_refuses(answered: tuple[Parties, dict[int, bytes]]) -> None:
    state = answered[0].states[0]
    refused("2 clients survived, but the threshold is 3", None, client.reveal, state, [0, 1], lenient(0))
    refused("2 clients survived, but the threshold is 3", None, client.reveal, state, [0, 1, 1, 0], lenient(0))
    refused("says that this client dropped out", None, client.reveal, state, [1, 2, 3, 4], lenient(0))
    refused(r"did not share their secrets: \[9\]", None, client.reveal, state, [0, 1, 2, 9], lenient(0))


def test_a_client_that_did_not_share_is_no_survivor() -> None:
    parties = shared(agreement_for(CLIENTS, 3), silent=[4])
    masked(parties, INPUTS)
    refused(r"did not share their secrets: \[4\]", None, client.reveal, parties.states[0], list(CLIENTS), lenient(0))


def test_shares_before_the_input_are_refused(parties: Parties) -> None:
    refused(
        "before this client sent its masked input", None, client.reveal, parties.states[0], list(CLIENTS), lenient(0)
    )


def test_both_kinds_of_shares_of_one_client_are_never_revealed(answered: tuple[Parties, dict[int, bytes]]) -> None:
    """Told once that client 4 survived, no one says what it would say had client 4 dropped out."""
    parties, _ = answered
    for own in (0, 1, 2, 3):
        state, reply = client.reveal(stored(parties.states[own]), list(CLIENTS), lenient(own))
        assert client.reveal(stored(state), [4, 3, 2, 1, 0], lenient(own)) == (state, reply)
        refused("a second time, with other survivors", None, client.reveal, stored(state), [0, 1, 2, 3], lenient(own))
        pair = state.shares[4]
        assert pair[:SHARE_BYTES] in reply
        assert pair[SHARE_BYTES:] not in reply


def test_a_dropped_clients_seed_is_never_revealed(answered: tuple[Parties, dict[int, bytes]]) -> None:
    state, reply = client.reveal(answered[0].states[0], [0, 1, 2], lenient(0))
    for dropped in (3, 4):
        pair = state.shares[dropped]
        assert pair[SHARE_BYTES:] in reply
        assert pair[:SHARE_BYTES] not in reply
    assert len(reply) == 5 * SHARE_BYTES


@pytest.mark.parametrize("clients", range(2, 12))
def test_a_threshold_that_is_no_majority_is_refused(clients: int) -> None:
    """Else a server could tell half of the clients that one survived, the others that it dropped out, and unmask it."""
    with pytest.raises(UserError, match="not a majority"):
        Setup("run", clients, clients // 2, 32, 1.0)
    assert Setup("run", clients, clients // 2 + 1, 32, 1.0).threshold == clients // 2 + 1


# What the server refuses.


def test_masked_inputs_that_do_not_fit_the_others_are_refused_by_name(
    answered: tuple[Parties, dict[int, bytes]],
) -> None:
    parties, replies = answered

    def check(own: int, reply: bytes) -> None:
        server.check_masked(parties.agreement, parties.keys, own, reply)

    for own, reply in replies.items():
        check(own, reply)
    refused("no shares", 9, check, 9, replies[0])
    for wrong in (b"", replies[2][:-1], replies[2] + b"\0", replies[2][: 2 * DIGEST_BYTES]):
        refused(r"bytes, not 108", 2, check, 2, wrong)
    refused("other masks or terms", 2, check, 2, flipped(replies[2], 0))


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.zeros(5), "c": torch.zeros(2, 3)},
        {"a": torch.zeros(5), "b": torch.zeros(3, 2)},
        {"a": torch.zeros(11)},
        {"a": torch.zeros(5), "b": torch.zeros(2, 3), "c": torch.zeros(0)},
        {"a": torch.zeros(5)},
    ],
)
def test_tensors_with_other_names_or_shapes_are_refused_by_both_sides(parties: Parties, tensors: dict) -> None:
    """A client that was told to mask them refuses; one that masks them under terms of its own is found out."""
    shares = parties.routed[3]
    refused("other tensors than it announced", None, client.mask, parties.states[3], shares, tensors)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    alone = replace(parties.agreement, shapes=shapes)
    liar = Parties(alone, parties.states, parties.keys, {})
    received = {}
    for sender in shares:
        key = client._encryption(replace(parties.states[3], agreement=alone), sender, parties.keys)
        received[sender] = client.primitives.seal(key, bytes(66), alone.digest, sender, 3)
    _, reply = client.mask(replace(liar.states[3], agreement=alone), received, tensors)
    refused("masked input", 3, server.check_masked, parties.agreement, parties.keys, 3, reply)


def test_masks_with_other_partners_are_refused_by_name() -> None:
    """A client that was not told of all who shared has masks that would not cancel."""
    parties = shared(agreement_for(CLIENTS, 3))
    del parties.routed[3][4]
    replies = masked(parties, INPUTS)
    refused("masks", 3, server.check_masked, parties.agreement, parties.keys, 3, replies[3])


CHANGES: list[dict[str, Any]] = [{"bound": 2.0}, {"threshold": 4}, {"summation": "another"}]


def test_terms_that_differ_are_refused_by_name(answered: tuple[Parties, dict[int, bytes]]) -> None:
    parties, replies = answered
    agreement = parties.agreement
    weights = dict(zip(agreement.weights, reversed(agreement.weights.values()), strict=True))
    others = [
        *(replace(agreement, setup=replace(agreement.setup, **other)) for other in CHANGES),
        *(replace(agreement, **other) for other in ({"run": "x"}, {"round": 4}, {"exchange": 2}, {"weights": weights})),
    ]
    for other in others:
        refused("terms", 0, server.check_masked, other, parties.keys, 0, replies[0])


def test_revealed_shares_that_are_malformed_are_refused_by_name_and_can_be_left_out(
    answered: tuple[Parties, dict[int, bytes]],
) -> None:
    parties, replies = answered
    answers = revealed(parties, replies)
    good = answers[1]
    for wrong in (b"", good[:-1], good + b"\0", good + good[:SHARE_BYTES], b"\xff" + good[1:]):
        unmask = (parties.agreement, parties.keys, replies, answers | {1: wrong})
        refused("not 5 field elements", 1, server.unmask, *unmask)
    rest = {own: reply for own, reply in answers.items() if own != 1}
    total = server.unmask(parties.agreement, parties.keys, replies, rest)
    assert all(torch.equal(total[name].double(), value) for name, value in plain_sum(INPUTS, CLIENTS).items())
    refused("no masked input", 9, server.unmask, parties.agreement, parties.keys, replies, answers | {9: good})


@pytest.mark.parametrize(("client_of_share", "secret"), [(0, "seed of client 0"), (4, "mask key of client 4")])
def test_wrong_shares_end_in_an_error_and_not_in_a_wrong_sum(
    parties: Parties, client_of_share: int, secret: str
) -> None:
    replies = masked(parties, INPUTS, dropped=[4])
    answers = revealed(parties, replies)
    answers[1] = flipped(answers[1], (client_of_share + 1) * SHARE_BYTES - 1)
    refused(secret, None, server.unmask, parties.agreement, parties.keys, replies, answers)


# The state.


def test_the_state_goes_through_bytes_at_each_stage() -> None:
    agreement = agreement_for([0, 2**63 - 1], bits=64, bound=0.1)
    pairs = {own: client.advertise(agreement, lenient(own)) for own in agreement.weights}
    keys = {own: message for own, (_, message) in pairs.items()}
    states = {own: state for own, (state, _) in pairs.items()}
    seen = [states[0]]
    sent = {}
    for own in keys:
        states[own], sent[own] = client.share(states[own], keys, lenient(own))
    seen.append(states[0])
    routed = server.route(agreement, keys, sent)
    states[0], _ = client.mask(states[0], routed[0], INPUTS[0])
    seen.append(states[0])
    seen.append(client.reveal(states[0], list(keys), lenient(0))[0])
    assert [stored(state) for state in seen] == seen
    assert len({state.to_bytes() for state in seen}) == 4


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b"[]", b"null", b'{"agreement": {}}'])
def test_damaged_states_are_told(parties: Parties, content: bytes) -> None:
    refused("stored state of this client is damaged", None, State.from_bytes, content)
    refused("damaged", None, State.from_bytes, parties.states[0].to_bytes()[:-9])


def test_a_printed_state_shows_no_secret(answered: tuple[Parties, dict[int, bytes]]) -> None:
    state = answered[0].states[0]
    for secret in (state.encryption_private, state.mask_private, state.seed, *state.shares.values()):
        assert repr(secret) not in repr(state)
        assert secret.hex() not in repr(state)
