"""What must hold for every registered method, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.adapters.state import AdapterState
from lorica.client import Client
from lorica.config import MethodConfig, OptimizerConfig, PrivacyConfig
from lorica.engines.local import LocalEngine
from lorica.federation import Federation, participation_schedule
from lorica.messages import Request
from lorica.methods.base import Method, Server, make_method, registry
from lorica.optimizers import learning_rates
from lorica.privacy.ledger import Ledger
from lorica.privacy.plan import plan_client
from tests.models import adapted, one_at_a_time
from tests.records import TinyRecords

METHODS = sorted(registry())
PRIVACY = PrivacyConfig(epsilon=5.0, delta=1e-3, clip_norm=1.0, noise="reproducible")
ROUNDS, STEPS = 4, 2


class Recorder:
    """An engine that keeps what passes, and may relabel clients."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine, self.requests, self.replies = engine, [], []

    def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
        replies = self.engine.exchange(requests)
        self.requests.append(dict(requests))
        self.replies.append(replies)
        return replies


def federation(
    name: str,
    folder: Path,
    clients: int = 3,
    seed: int = 0,
    privacy: Any = PRIVACY,
    options: dict[str, Any] | None = None,
    participation: float = 1.0,
    batch_size: int = 8,
    steps: int = STEPS,
) -> Federation:
    model = adapted("bert", seed, randomise=False)
    state = AdapterState(model.sites, model.read())
    method = make_method(MethodConfig(name=name, **(options or {})), model.sites)
    schedule = participation_schedule(clients, ROUNDS, participation, seed)
    plans = {
        number: plan_client(number, 20, batch_size, steps * sum(number in who for who in schedule), privacy)
        for number in range(clients)
    }
    ledger = Ledger(folder / "ledger.sqlite")
    members = {
        number: Client(number, TinyRecords.texts(20, seed=number), plans[number], ledger, "data", seed, 64)
        for number in range(clients)
    }
    optimizer = OptimizerConfig(lr=0.5)
    server = Server(
        model=state,
        rounds=ROUNDS,
        terms={number: plan.terms for number, plan in plans.items()},
        optimizer=optimizer,
        local_steps=steps,
        rates=learning_rates(optimizer, list(state.tensors)),
        seed=seed,
    )
    method.start(state)
    engine = Recorder(LocalEngine(model, members))
    return Federation("run", method, server, engine, plans, schedule, "uniform")


def run(some: Federation, rounds: int = ROUNDS) -> Federation:
    for _ in range(rounds):
        some.round()
    return some


@pytest.mark.parametrize("name", METHODS)
def test_shapes_and_names_stay_and_values_move(name: str, tmp_path: Path) -> None:
    some = federation(name, tmp_path)
    before = dict(some.server.model.tensors)
    run(some)
    after = some.server.model.tensors
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize("name", METHODS)
def test_only_trained_tensors_travel_up_and_only_they_change(name: str, tmp_path: Path) -> None:
    some = federation(name, tmp_path)
    for _ in range(ROUNDS):
        before = dict(some.server.model.tensors)
        count = len(some.engine.requests)
        some.round()
        trained = set()
        for requests, replies in zip(some.engine.requests[count:], some.engine.replies[count:], strict=True):
            for client, request in requests.items():
                assert set(replies[client]) == set(request.trained)
                trained |= set(request.trained)
        for key, value in some.server.model.tensors.items():
            assert key in trained or torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_the_ledger_holds_every_planned_release_and_no_more(name: str, tmp_path: Path) -> None:
    some = run(federation(name, tmp_path))
    ledger = Ledger(tmp_path / "ledger.sqlite")
    releases = ledger.releases("data")
    assert len(releases) == sum(len(replies) for replies in some.engine.replies)
    for number, plan in some.plans.items():
        assert ledger.steps("run", number) == plan.max_steps
        assert plan.epsilon(ledger.steps("run", number)) <= 5.0


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_clients_does_not_matter(name: str, tmp_path: Path) -> None:
    """Replies that arrive in another order give the same adapter, bit for bit."""
    ordered = run(federation(name, tmp_path))

    class Shuffled(Recorder):
        def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
            return dict(reversed(super().exchange(requests).items()))

    other = federation(name, tmp_path / "other")
    other.engine = Shuffled(other.engine.engine)
    run(other)
    for key, value in ordered.server.model.tensors.items():
        assert torch.equal(value, other.server.model.tensors[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_resuming_equals_never_having_stopped(name: str, tmp_path: Path) -> None:
    whole = run(federation(name, tmp_path / "whole"))
    first = run(federation(name, tmp_path / "halves"), 2)
    numbers, tensors = first.method.state()
    rest = federation(name, tmp_path / "halves")
    # What a checkpoint holds survives JSON and copying.
    rest.method.restore(json.loads(json.dumps(numbers)), {key: value.clone() for key, value in tensors.items()})
    rest.server.model.assign({key: value.clone() for key, value in first.server.model.tensors.items()})
    rest.server.round = 2
    run(rest, 2)
    for key, value in whole.server.model.tensors.items():
        assert torch.equal(value, rest.server.model.tensors[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_partial_participation_sends_what_changed_meanwhile(name: str, tmp_path: Path) -> None:
    some = federation(name, tmp_path, clients=3, participation=0.34)
    held: dict[int, dict[str, Tensor]] = {}
    for _ in range(ROUNDS):
        current = dict(some.server.model.tensors)
        count = len(some.engine.requests)
        traffic = some.round()
        (client,) = traffic.participants
        held.setdefault(client, {}).update(some.engine.requests[count][client].tensors)
        assert held[client].keys() == current.keys()
        assert all(held[client][key] is current[key] for key in current)
    for number, plan in some.plans.items():
        assert Ledger(tmp_path / "ledger.sqlite").steps("run", number) == plan.max_steps


@pytest.mark.parametrize("name", [name for name in METHODS if registry()[name].about.exact])
def test_exact_methods_aggregate_the_product_exactly(name: str, tmp_path: Path) -> None:
    """The new `B A` of every site equals `Σ_k w_k B_k A_k` of the clients, by dense algebra."""
    some = federation(name, tmp_path)
    for _ in range(ROUNDS):
        before = dict(some.server.model.tensors)
        some.round()
        for site in some.server.model.sites:
            dense = torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
            for reply in some.engine.replies[-1].values():
                a = before[site.a] + reply.get(site.a, 0)
                b = before[site.b] + reply.get(site.b, 0)
                dense += (b.double() @ a.double()) / len(some.plans)
            after = some.server.model.tensors
            torch.testing.assert_close((after[site.b] @ after[site.a]).double(), dense, rtol=1e-5, atol=1e-5)


def test_averaging_both_factors_has_the_known_error(tmp_path: Path) -> None:
    """`Σ w_k B_k A_k - B̄ Ā = Σ w_k (B_k - B̄)(A_k - Ā)`, and it is not zero."""
    some = run(federation("fed-avg", tmp_path), 2)
    before = dict(some.server.model.tensors)
    some.round()
    site, after = some.server.model.sites[0], some.server.model.tensors
    factors = [
        (before[site.a] + reply[site.a], before[site.b] + reply[site.b]) for reply in some.engine.replies[-1].values()
    ]
    mean_a, mean_b = sum(a for a, _ in factors) / 3, sum(b for _, b in factors) / 3
    torch.testing.assert_close(after[site.a], mean_a)
    error = sum(b @ a for a, b in factors) / 3 - mean_b @ mean_a
    known = sum((b - mean_b) @ (a - mean_a) for a, b in factors) / 3
    torch.testing.assert_close(error, known, rtol=1e-3, atol=1e-6)
    assert error.norm() > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_one_client_without_noise_equals_centralised_training(name: str, tmp_path: Path) -> None:
    """One local step on all records: plain gradient descent on the trained tensors, by one-at-a-time autograd."""
    some = federation(name, tmp_path, clients=1, privacy="none", batch_size=20, steps=1)
    records = TinyRecords.texts(20, seed=0)
    reference = adapted("bert", 0, randomise=False)
    for _ in range(ROUNDS):
        before = dict(some.server.model.tensors)
        some.round()
        reference.write(before)
        gradients = one_at_a_time(reference, records.batch(np.arange(20)))
        trained = some.engine.requests[-1][0].trained
        for key, value in some.server.model.tensors.items():
            expected = before[key] - 0.5 * gradients[key].mean(0) if key in trained else before[key]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_described(name: str) -> None:
    method = registry()[name]
    assert issubclass(method, Method)
    assert method.name == name
    assert "arXiv" in (method.__doc__ or "") or "ablation" in method.about.paper
    assert "DP:" in (method.__doc__ or "")
    assert all((method.about.paper, method.about.arxiv, method.about.trains, method.about.sends, method.about.privacy))
