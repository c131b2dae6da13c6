"""The round loop: who takes part, what is sent, and the traffic of a round. Independent of method and engine."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from lorica.adapters.names import ENERGY, SKETCH, Pair, is_factor, site_of, under
from lorica.adapters.state import AdapterState, Factors, leading, with_ranks
from lorica.errors import UserError
from lorica.messages import Delivery, Projection, Request, Training, size
from lorica.methods.base import Method
from lorica.methods.exchange import Project, Replies, Train
from lorica.methods.server import Server
from lorica.privacy.plan import ClientPlan
from lorica.privacy.statement import Account
from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.quantisation import coordinates
from lorica.secure_sum.setup import Setup
from lorica.server.reply_checks import Expected, check_reply, expected_reply, reply_shapes
from lorica.server.shared_noise import agreed_noise, shared_setup, shared_terms

Weighting = Literal["uniform", "records", "noise"]
WORD_BITS = 32
logger = logging.getLogger(__name__)


class TooFewReplies(UserError):
    """A round has too few replies. Finished rounds are kept; in a new run, clients repeat their stored replies."""


class Engine(Protocol):
    """Moves messages between the server and the clients."""

    @property
    def ledger(self) -> str:
        """Where releases are recorded, for display."""

    def join(self, run: str) -> Mapping[int, ClientPlan]:
        """Client -> its plan for this run, of all clients or only of those that have joined since the last call."""

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        """Client -> the tensors that it released. Clients that did not reply are left out."""

    def sum(self, requests: Mapping[int, Request], agreement: Agreement) -> tuple[list[int], dict[str, Tensor]]:
        """The weighted sum of the replies, without the single replies (`lorica.secure_sum.stages.add_up`).

        Returns:
            The clients in the sum, and the sum; both empty if too few clients took part.
        """

    def accounts(self, run: str) -> Mapping[int, Account]:
        """Client -> the steps and releases charged to it in this run."""

    def personal(self, run: str, round_number: int) -> Mapping[int, Mapping[str, Tensor]]:
        """Client -> tensors of its personal model after a round (`Method.personal`), for clients in this process."""


@dataclass
class Traffic:
    """Traffic of one round, and the time of the server's own work.

    Attributes:
        participants: clients that replied to every request of the round.
        missing: clients that were scheduled but have not joined, did not reply, or sent a reply that was refused. They
            take no further part in the round.
        bytes_up, bytes_down: client -> bytes received from it (refused replies included) and sent to it.
        factors: site name -> factors trained in the round.
    """

    participants: list[int]
    bytes_up: dict[int, int]
    bytes_down: dict[int, int]
    missing: list[int] = field(default_factory=list)
    server_seconds: float = 0.0
    factors: dict[str, Factors] = field(default_factory=dict)


@dataclass
class SentState:
    """The state of the global adapter that a client has been sent.

    Attributes:
        requests: number of requests sent to it.
        rank: rank of its factors; None for the full rank.
        versions: tensor name -> version.
        epoch: epoch of the merged ranks (`AdapterState.epoch`); None before the first request.
        merged: site name -> number of merged ranks.
    """

    requests: int = 0
    rank: int | None = None
    versions: dict[str, int] = field(default_factory=dict)
    epoch: int | None = None
    merged: dict[str, int] = field(default_factory=dict)


@dataclass
class Federation:
    """One run's server side.

    Attributes:
        run: id of the run.
        plans: client -> its plan, for all clients that have joined.
        schedule: participants of each round; index 0 is round 1.
        weighting: how clients are weighted in a mean.
        secure_sum: whether replies are added up under masks.
        trusted: replies come from this process, so only their shapes are checked.
        min_clients: minimum number of replies in a round; None requires the replies of all participants.
    """

    run: str
    method: Method
    server: Server
    engine: Engine
    plans: dict[int, ClientPlan]
    schedule: list[list[int]]
    weighting: Weighting
    min_clients: int | None = None
    secure_sum: bool = False
    trusted: bool = False
    _sent: dict[int, SentState] = field(default_factory=dict)
    _joined: set[int] = field(default_factory=set)

    def join(self) -> None:
        """Add the clients that have joined since the last call."""
        joined = self.engine.join(self.run)
        if joined.keys() <= self._joined:
            return
        self._joined |= joined.keys()
        self.plans |= joined
        self.server.terms = {client: plan.terms for client, plan in self.plans.items()}
        if self._shares_noise:
            self.server.terms = shared_terms(self.plans, client_weights(self.weighting, list(self.plans.values())))

    @property
    def _shares_noise(self) -> bool:
        return any(plan.shared is not None for plan in self.plans.values())

    def deliver(self, final: bool) -> None:
        """Send the evaluated model to all clients."""
        work = Delivery(self.server.evaluated, self.server.model.merged, final, self.method.personal)
        self.engine.exchange(
            {client: Request(self.run, client, self.server.round, 0, {}, work) for client in self.plans}
        )

    def round(self) -> Traffic:
        """Run the next round: drive the method's generator, with one exchange for each `Train` or `Project` it yields.

        A client that does not reply takes no further part in the round. Its earlier replies count, later exchanges go
        to the other clients, and weights are computed over the clients that replied.

        Raises:
            TooFewReplies: fewer than `min_clients` replied. Do not reuse this object; rebuild it from the last
                checkpoint. The repeated round gets the stored replies of the clients that had already replied.
        """
        self.join()
        self.server.round += 1
        scheduled = self.schedule[self.server.round - 1]
        absent = {client: "it has not joined" for client in scheduled if client not in self.plans}
        present = [client for client in scheduled if client in self.plans]
        traffic = Traffic(present, dict.fromkeys(present, 0), dict.fromkeys(present, 0), sorted(absent))
        self._check_enough(traffic, absent)
        started = time.perf_counter()
        steps = self.method.round(self.server)
        asked = next(steps, None)
        expected: dict[int, Expected] = {}
        exchange = 0
        while asked is not None:
            exchange += 1
            requests = self._requests(asked, traffic.participants, exchange)
            traffic.server_seconds += time.perf_counter() - started
            if self.secure_sum:
                replies = self._sum_exchange(requests, expected, traffic)
                started = time.perf_counter()
            else:
                arrived = self.engine.exchange(requests)
                started = time.perf_counter()
                released = self._accept_replies(requests, arrived, expected, traffic)
                replies = replace(_replies(released, self._weights(traffic)), aggregate=self.server.aggregate)
            if isinstance(asked, Train) and asked.slices:
                replies = self._whole(replies, asked)
            if isinstance(asked, Train):
                traffic.factors = _union(traffic.factors, _per_site(asked, self.server))
            if isinstance(asked, Train) and self.server.scaffold is not None:
                self.server.scaffold.learn(replies.updates, replies.weights, self.server.rates, self.server.local_steps)
            try:
                asked = steps.send(replies)
            except StopIteration:
                asked = None
        self.server.finish_round()
        traffic.server_seconds += time.perf_counter() - started
        return traffic

    def _whole(self, replies: Replies, train: Train) -> Replies:
        """The replies with updates of whole factors: zero at the ranks that a client did not train."""
        factors = [name for name in self.server.model.trained(train.factors) if is_factor(name)]

        def whole(updates: Mapping[str, Tensor], slices: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
            zeros = {name: torch.zeros_like(self.server.model.tensors[name]) for name in factors}
            return dict(updates) | {
                name: with_ranks(name, zero, slices[site_of(name)], updates[name]) if name in updates else zero
                for name, zero in zeros.items()
            }

        if replies.means is not None:
            # A sum has members of one shape only.
            return replace(replies, means=whole(replies.means, next(iter(train.slices.values()))))
        updates = {
            client: whole(sent, train.slices[client]) if client in train.slices else sent
            for client, sent in replies.updates.items()
        }
        return replace(replies, updates=updates)

    def _weights(self, traffic: Traffic) -> dict[int, float]:
        return client_weights(self.weighting, [self.plans[client] for client in traffic.participants])

    def _sum_exchange(
        self, requests: Mapping[int, Request], expected: dict[int, Expected], traffic: Traffic
    ) -> Replies:
        """One exchange in which the server sees only the weighted sum over the clients that stayed to the end.

        No coordinate of an honest weighted update exceeds its norm bound, so the sum clips none of them.
        """
        weights = self._weights(traffic)
        for client, request in requests.items():
            expected[client] = self._expected(request, expected)
            traffic.bytes_down[client] += request.nbytes
        bound = max(weights[client] * max(expected[client].norms.values()) for client in requests)
        shapes = expected[next(iter(requests))].shapes
        needed = len(requests) if self.min_clients is None else self.min_clients
        threshold = max(needed, len(requests) // 2 + 1)
        setup = Setup(f"{self.run} {uuid.uuid4().hex}", len(requests), threshold, WORD_BITS, bound)
        exchange, noise = next(iter(requests.values())).exchange, None
        if self._shares_noise:
            adapter = self.server.model.tensors
            setup = shared_setup(setup, requests, weights, adapter)
            noise = agreed_noise(requests, self.plans, weights, adapter)
        agreement = Agreement(setup, self.run, self.server.round, exchange, weights, shapes, noise)
        clients, total = self.engine.sum(requests, agreement)
        for client in clients:
            traffic.bytes_up[client] += coordinates(shapes) * setup.word.itemsize
        self._leave_out({client: "it is not in the sum" for client in requests if client not in clients}, traffic)
        share = sum(weights[client] for client in clients)
        means = {name: value / share for name, value in total.items()}
        return Replies(
            {},
            self._weights(traffic),
            means={name: value for name, value in means.items() if not name.startswith(SKETCH)},
            mean_sketches=under(SKETCH, means),
        )

    def _expected(self, request: Request, expected: Mapping[int, Expected]) -> Expected:
        if self.trusted:
            return Expected(reply_shapes(request, self.server.model.tensors))
        records, earlier = self.plans[request.client].records, expected.get(request.client)
        return expected_reply(request, records, self.server.model.tensors, self.server.seed, earlier)

    def _accept_replies(
        self,
        requests: Mapping[int, Request],
        replies: Mapping[int, Mapping[str, Tensor]],
        expected: dict[int, Expected],
        traffic: Traffic,
    ) -> dict[int, Mapping[str, Tensor]]:
        """Client -> its reply, if that passes the checks. All other clients become missing in this round.

        Args:
            expected: client -> the expected reply to its last request of this round; updated in place.
        """
        accepted, reasons = {}, {}
        for client, request in requests.items():
            traffic.bytes_down[client] += request.nbytes
            if client not in replies:
                reasons[client] = "no reply"
                continue
            expected[client] = self._expected(request, expected)
            try:
                traffic.bytes_up[client] += size(replies[client])
                wrong = check_reply(replies[client], expected[client])
            except Exception as error:
                # An unexpected error in a check excludes only this client.
                wrong = f"it cannot be checked ({type(error).__name__})"
            if wrong is None:
                accepted[client] = replies[client]
            else:
                reasons[client] = f"its reply was refused: {wrong}"
        self._leave_out(reasons, traffic)
        return accepted

    def _leave_out(self, reasons: Mapping[int, str], traffic: Traffic) -> None:
        for client, reason in reasons.items():
            logger.warning("round %d continues without client %d: %s", self.server.round, client, reason)
            # It may or may not have received the last request.
            self._sent.pop(client, None)
        traffic.participants = [client for client in traffic.participants if client not in reasons]
        traffic.missing = sorted([*traffic.missing, *reasons])
        self._check_enough(traffic, reasons)

    def _check_enough(self, traffic: Traffic, reasons: Mapping[int, str]) -> None:
        replied = len(traffic.participants)
        needed = replied + len(traffic.missing) if self.min_clients is None else self.min_clients
        if replied < needed:
            why = "; ".join(f"client {client}: {reason}" for client, reason in sorted(reasons.items()))
            raise TooFewReplies(
                "federation.min_clients",
                self.min_clients,
                f"round {self.server.round} needs {needed} replies and has {replied} ({why})",
                "check these clients and run the same command again; finished rounds are kept, and no reply is charged "
                "twice",
            )

    def _requests(self, asked: Train | Project, participants: list[int], exchange: int) -> dict[int, Request]:
        server, scaffold = self.server, self.server.scaffold
        if isinstance(asked, Train):
            common: Training | Projection = self._training(asked, participants[0])
        else:
            common = Projection({name: basis.contiguous() for name, basis in asked.bases.items()})
        requests = {}
        # One copy for all participants.
        versions, merged = dict(server.model.versions), {n: p[0].shape[1] for n, p in server.model.merged.items()}
        for client in participants:
            sent = self._sent.setdefault(client, SentState())
            rank = asked.ranks.get(client) if isinstance(asked, Train) else sent.rank
            work = common
            if isinstance(work, Training):
                corrections = {} if scaffold is None else scaffold.corrections(client, work.trained)
                work = replace(work, terms=server.terms[client], rank=rank, corrections=corrections)
                if isinstance(asked, Train) and client in asked.slices:
                    work = _sliced(work, asked.slices[client])
            tensors = self._changed(sent, rank, versions)
            restart, increments = self._new_increments(sent, merged)
            requests[client] = Request(
                self.run, client, server.round, exchange, tensors, work, increments, restart, sent.requests
            )
            sent.requests += 1
        return requests

    def _training(self, train: Train, client: int) -> Training:
        """The part of the work that all clients of an exchange share, with the terms of one of them."""
        server = self.server
        trained = tuple(server.model.trained(train.factors))
        return Training(
            trained=trained,
            terms=server.terms[client],
            steps=server.local_steps if train.steps is None else train.steps,
            optimizer=server.optimizer,
            rates={name: server.rates[name] for name in trained},
            local=server.local if train.local is None else train.local,
            rounds=server.rounds,
            personal=tuple(name for name in trained if name in train.personal),
            sketch_columns=train.sketch_columns,
            last_step_energy=train.last_step_energy,
        )

    def _changed(self, sent: SentState, rank: int | None, versions: dict[str, int]) -> dict[str, Tensor]:
        """Tensors that the client does not have yet; all tensors if its rank has grown."""
        model = self.server.model
        known = {} if _has_grown(sent.rank, rank) else sent.versions
        changed = {
            # Contiguous, as after decoding: other layouts can round differently, and engines must agree bit for bit.
            name: leading(name, value, rank).contiguous()
            for name, value in model.tensors.items()
            if known.get(name) != versions[name]
        }
        sent.rank, sent.versions = rank, versions
        return changed

    def _new_increments(self, sent: SentState, merged: dict[str, int]) -> tuple[bool, dict[str, Pair]]:
        """Merged ranks that the client does not have yet, and whether they replace all that it has."""
        model = self.server.model
        restart = sent.epoch != model.epoch
        have = {} if restart else sent.merged
        sent.epoch, sent.merged = model.epoch, merged
        return restart, new_ranks(model, have)


def _sliced(work: Training, slices: Mapping[str, tuple[int, ...]]) -> Training:
    """The same work for these ranks alone."""
    trained = tuple(name for name in work.trained if not is_factor(name) or site_of(name) in slices)
    return replace(work, trained=trained, rates={name: work.rates[name] for name in trained}, slices=slices)


def new_ranks(model: AdapterState, have: Mapping[str, int]) -> dict[str, Pair]:
    """Site -> `(B, A)`: the merged ranks after the first `have[site]`. Sites without new ranks are left out."""
    found = {}
    for name, (b, a) in model.merged.items():
        first = have.get(name, 0)
        if first < b.shape[1]:
            found[name] = (b[:, first:].contiguous(), a[first:].contiguous())
    return found


def client_weights(weighting: str, plans: list[ClientPlan]) -> dict[int, float]:
    """Weights of the participants of a round; they sum to 1.

    `uniform`: equal. `records`: `n_k`. `noise`: `1/τ_k²`, which minimises the noise variance of the mean, or `1/τ_k` if
    the clients share the noise, so that nobody adds more than its own part of it. Without noise, `noise` means
    `records`, the weights of FedAvg.
    """
    if weighting == "records" or (weighting == "noise" and plans[0].noise == "none"):
        values = np.array([plan.records for plan in plans], dtype=float)
    elif weighting == "noise":
        values = np.array([plan.noise_std ** (-2 if plan.shared is None else -1) for plan in plans])
    else:
        values = np.ones(len(plans))
    return {plan.client: float(weight) for plan, weight in zip(plans, values / values.sum(), strict=True)}


def _has_grown(before: int | None, now: int | None) -> bool:
    return before is not None and (now is None or now > before)


def _replies(released: Mapping[int, Mapping[str, Tensor]], weights: dict[int, float]) -> Replies:
    return Replies(
        updates={
            client: {name: value for name, value in tensors.items() if not name.startswith((ENERGY, SKETCH))}
            for client, tensors in released.items()
        },
        weights=weights,
        energies={
            client: {name: float(value) for name, value in under(ENERGY, tensors).items()}
            for client, tensors in released.items()
        },
        sketches={client: under(SKETCH, tensors) for client, tensors in released.items()},
    )


def _per_site(train: Train, server: Server) -> dict[str, Factors]:
    if isinstance(train.factors, Mapping):
        return dict(train.factors)
    return {site.name: train.factors for site in server.model.sites}


def _union(first: Mapping[str, Factors], second: Mapping[str, Factors]) -> dict[str, Factors]:
    """Site name -> the factors trained in either of two exchanges."""
    union: dict[str, Factors] = dict(first)
    for name, factors in second.items():
        both = "".join(sorted(set(union.get(name, "") + factors)))
        union[name] = both  # type: ignore[assignment]
    return union
