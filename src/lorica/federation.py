"""The round loop: who takes part, what travels, what a round cost. Knows neither methods nor engines by name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from lorica.adapters.state import Factors
from lorica.messages import Request, size
from lorica.methods.base import Method, Replies, Server, Train
from lorica.privacy.plan import ClientPlan
from lorica.streams import numpy_stream

ENERGY = "energy:"
Weighting = Literal["uniform", "records", "noise"]


class Engine(Protocol):
    """Moves one exchange's messages."""

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        """Client -> the tensors that it released."""


@dataclass
class Traffic:
    """What one round moved and how long the server's own work took."""

    participants: list[int]
    bytes_up: dict[int, int]
    bytes_down: dict[int, int]
    server_seconds: float = 0.0
    factors: dict[str, Factors] = field(default_factory=dict)


@dataclass
class Federation:
    """One run's server side.

    Attributes:
        run: identity of the run.
        schedule: participants of each round, index 0 for round 1.
        weighting: how clients are weighted in a mean.
    """

    run: str
    method: Method
    server: Server
    engine: Engine
    plans: Mapping[int, ClientPlan]
    schedule: list[list[int]]
    weighting: Weighting
    _sent: dict[int, dict[str, int]] = field(default_factory=dict)

    def round(self) -> Traffic:
        """Run the next round: drive the method's generator, one exchange for each request that it yields."""
        self.server.round += 1
        participants = self.schedule[self.server.round - 1]
        traffic = Traffic(participants, dict.fromkeys(participants, 0), dict.fromkeys(participants, 0))
        weights = client_weights(self.weighting, [self.plans[client] for client in participants])
        steps = self.method.round(self.server)
        started = time.perf_counter()
        request = next(steps, None)
        exchange = 0
        while request is not None:
            exchange += 1
            requests = {client: self._request(request, client, exchange) for client in participants}
            traffic.server_seconds += time.perf_counter() - started
            released = self.engine.exchange(requests)
            for client in participants:
                traffic.bytes_down[client] += requests[client].bytes
                traffic.bytes_up[client] += size(released[client])
            traffic.factors = _per_site(request, self.server)
            started = time.perf_counter()
            try:
                request = steps.send(_replies(released, weights))
            except StopIteration:
                request = None
        traffic.server_seconds += time.perf_counter() - started
        return traffic

    def _request(self, train: Train, client: int, exchange: int) -> Request:
        model = self.server.model
        known = self._sent.setdefault(client, {})
        changed = {name: value for name, value in model.tensors.items() if known.get(name) != model.versions[name]}
        known.update(model.versions)
        trained = tuple(model.trained(train.factors))
        return Request(
            run=self.run,
            client=client,
            round=self.server.round,
            exchange=exchange,
            trained=trained,
            tensors=changed,
            terms=self.server.terms[client],
            steps=self.server.local_steps,
            optimizer=self.server.optimizer,
            rates={name: self.server.rates[name] for name in trained},
            last_step_energy=train.last_step_energy,
        )


def participation_schedule(clients: int, rounds: int, participation: float, seed: int) -> list[list[int]]:
    """Participants of each round, sorted: `max(1, round(participation · clients))` of them.

    Balanced rotation: a public permutation is used up before the next one is drawn, so that after any number of rounds
    two clients' participations differ by at most one. The schedule is known before the run, so each client's budget is
    computed for exactly the steps that it will run.
    """
    size_of_round = max(1, round(participation * clients))
    draws = numpy_stream(seed, "participation")
    queue: list[int] = []
    schedule = []
    for _ in range(rounds):
        chosen: list[int] = queue[:size_of_round]
        queue = queue[size_of_round:]
        if len(chosen) < size_of_round:
            # Those who sit out the end of one permutation come first in the next one, and nobody is drawn twice.
            fresh = [client for client in draws.permutation(clients).tolist() if client not in chosen]
            needed = size_of_round - len(chosen)
            queue = fresh[needed:] + chosen
            chosen = chosen + fresh[:needed]
        schedule.append(sorted(chosen))
    return schedule


def client_weights(weighting: str, plans: list[ClientPlan]) -> dict[int, float]:
    """Weights of one round's participants, summing to 1.

    `uniform`: equal. `records`: `n_k`. `noise`: `1/τ_k²`, which minimises the noise variance of the mean.
    """
    if weighting == "records":
        values = np.array([plan.records for plan in plans], dtype=float)
    elif weighting == "noise":
        values = np.array([plan.terms.noise_std**-2 for plan in plans])
    else:
        values = np.ones(len(plans))
    return {plan.client: float(weight) for plan, weight in zip(plans, values / values.sum(), strict=True)}


def _replies(released: Mapping[int, Mapping[str, Tensor]], weights: dict[int, float]) -> Replies:
    updates = {
        client: {name: value for name, value in tensors.items() if not name.startswith(ENERGY)}
        for client, tensors in released.items()
    }
    energies = {
        client: {name.removeprefix(ENERGY): float(value) for name, value in tensors.items() if name.startswith(ENERGY)}
        for client, tensors in released.items()
    }
    return Replies(updates, weights, energies)


def _per_site(train: Train, server: Server) -> dict[str, Factors]:
    if isinstance(train.factors, Mapping):
        return dict(train.factors)
    return {site.name: train.factors for site in server.model.sites}
