"""A whole summation in one process, with clients that stop at a stage of choice."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.secure_sum import client, server
from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.client import State
from lorica.secure_sum.messages import check_keys
from lorica.secure_sum.requirements import Requirements
from lorica.secure_sum.setup import Setup

Inputs = Mapping[int, Mapping[str, Tensor]]
SHAPES = {"a": (5,), "b": (2, 3)}


def setup_for(clients: int, threshold: int | None = None, bits: int = 32, bound: float = 1.0) -> Setup:
    return Setup("run-7/round-3", clients, threshold or clients // 2 + 1, bits, bound)


def dyadic(clients: Collection[int]) -> dict[int, float]:
    """Shares that are powers of two, so that weighting rounds nothing: the largest is halved until all have one."""
    shares = [1.0]
    while len(shares) < len(clients):
        largest = max(shares)
        shares.remove(largest)
        shares += [largest / 2, largest / 2]
    return dict(zip(clients, sorted(shares), strict=True))


def agreement_for(clients: Collection[int], *setup: Any, shapes: Any = None, **named: Any) -> Agreement:
    return Agreement(setup_for(len(clients), *setup, **named), "run-7", 3, 1, dyadic(clients), shapes or SHAPES)


def lenient(own: int) -> Requirements:
    """Of a client that leaves all to the protocol's own checks."""
    return Requirements("run-7", own, min_clients=2, max_share=1.0)


def stored(state: State) -> State:
    """The state as the next process reads it."""
    return State.from_bytes(state.to_bytes())


@dataclass
class Parties:
    """Where a summation stands.

    Attributes:
        keys: of those that shared, once they did.
    """

    agreement: Agreement
    states: dict[int, State]
    keys: dict[int, bytes]
    routed: dict[int, dict[int, bytes]]


def shared(agreement: Agreement, silent: Collection[int] = ()) -> Parties:
    """Stages 1 and 2; `silent` clients advertise keys and then send no shares."""
    states, keys, sent = {}, {}, {}
    for own in agreement.weights:
        states[own], keys[own] = client.advertise(agreement, lenient(own))
    check_keys(agreement, keys)
    for own in agreement.weights:
        if own not in silent:
            states[own], sent[own] = client.share(stored(states[own]), keys, lenient(own))
    routed = server.route(agreement, keys, sent)
    return Parties(agreement, states, {own: keys[own] for own in routed}, routed)


def masked(parties: Parties, inputs: Inputs, dropped: Collection[int] = ()) -> dict[int, bytes]:
    """Stage 3 of all but the dropped clients."""
    replies = {}
    for own in parties.routed:
        if own not in dropped:
            state = stored(parties.states[own])
            parties.states[own], replies[own] = client.mask(state, parties.routed[own], inputs[own])
    return replies


def revealed(parties: Parties, survivors: Collection[int], silent: Collection[int] = ()) -> dict[int, bytes]:
    """Stage 4 of the survivors but the silent ones."""
    replies = {}
    for own in survivors:
        if own not in silent:
            state = stored(parties.states[own])
            parties.states[own], replies[own] = client.reveal(state, list(survivors), lenient(own))
    return replies


def summed(
    agreement: Agreement,
    inputs: Inputs,
    before_share: Collection[int] = (),
    before_mask: Collection[int] = (),
    before_reveal: Collection[int] = (),
) -> dict[str, Tensor]:
    """The sum that the server gets, with clients that drop out before these stages."""
    parties = shared(agreement, before_share)
    replies = masked(parties, inputs, before_mask)
    return server.unmask(agreement, parties.keys, replies, revealed(parties, replies, before_reveal))


def random_inputs(clients: Collection[int], seed: int = 0) -> dict[int, dict[str, Tensor]]:
    """Values in (-1, 1) that are multiples of 2⁻¹⁰, whose sums at dyadic shares fp32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-1023, 1024, shape, generator=generator) / 1024

    return {own: {"b": draw(2, 3), "a": draw(5)} for own in clients}


def plain_sum(inputs: Inputs, clients: Collection[int]) -> dict[str, Tensor]:
    """Over some of the clients, at their shares of a sum over all of them."""
    weights = dyadic(list(inputs))
    names = next(iter(inputs.values()))
    return {name: torch.stack([weights[own] * inputs[own][name].double() for own in clients]).sum(0) for name in names}
