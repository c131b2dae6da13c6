"""A whole summation in one process, with clients that stop at a stage of choice."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.secure_sum import client, server
from lorica.secure_sum.client import State
from lorica.secure_sum.messages import check_keys
from lorica.secure_sum.setup import Setup

Inputs = Mapping[int, Mapping[str, Tensor]]


def setup_for(clients: int, threshold: int | None = None, bits: int = 32, bound: float = 1.0) -> Setup:
    return Setup("run-7/round-3", clients, threshold or clients // 2 + 1, bits, bound)


def stored(state: State) -> State:
    """The state as the next process reads it."""
    return State.from_bytes(state.to_bytes())


@dataclass
class Parties:
    """Where a summation stands.

    Attributes:
        keys: of those that shared, once they did.
    """

    setup: Setup
    states: dict[int, State]
    keys: dict[int, bytes]
    routed: dict[int, dict[int, bytes]]


def shared(setup: Setup, clients: Collection[int], silent: Collection[int] = ()) -> Parties:
    """Stages 1 and 2; `silent` clients advertise keys and then send no shares."""
    states, keys, sent = {}, {}, {}
    for own in clients:
        states[own], keys[own] = client.advertise(setup, own)
    check_keys(setup, keys)
    for own in clients:
        if own not in silent:
            states[own], sent[own] = client.share(stored(states[own]), keys)
    routed = server.route(setup, keys, sent)
    return Parties(setup, states, {own: keys[own] for own in routed}, routed)


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
            parties.states[own], replies[own] = client.reveal(stored(parties.states[own]), list(survivors))
    return replies


def summed(
    setup: Setup,
    inputs: Inputs,
    before_share: Collection[int] = (),
    before_mask: Collection[int] = (),
    before_reveal: Collection[int] = (),
) -> dict[str, Tensor]:
    """The sum that the server gets, with clients that drop out before these stages."""
    parties = shared(setup, list(inputs), before_share)
    replies = masked(parties, inputs, before_mask)
    shapes = {name: tensor.shape for name, tensor in next(iter(inputs.values())).items()}
    return server.unmask(setup, parties.keys, replies, revealed(parties, replies, before_reveal), shapes)


def random_inputs(clients: Collection[int], seed: int = 0) -> dict[int, dict[str, Tensor]]:
    """Values in (-1, 1) that are multiples of 2⁻¹⁰, whose sums fp32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-1023, 1024, shape, generator=generator) / 1024

    return {own: {"b": draw(2, 3), "a": draw(5)} for own in clients}


def plain_sum(inputs: Inputs, clients: Collection[int]) -> dict[str, Tensor]:
    names = next(iter(inputs.values()))
    return {name: torch.stack([inputs[own][name].double() for own in clients]).sum(0) for name in names}
