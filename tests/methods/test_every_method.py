"""What must hold for every registered method, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.sites import Site
from lorica.adapters.state import AdapterState
from lorica.config import MethodConfig, OptimizerConfig, PrivacyConfig
from lorica.engines.local import LocalEngine
from lorica.local.optimizers import learning_rates
from lorica.messages import Projection, Reply, Request, Training
from lorica.methods.base import Method, make_method, registry
from lorica.methods.server import Server
from lorica.owner.client import Client
from lorica.privacy.ledger import Ledger
from lorica.privacy.plan import plan_client
from lorica.privacy.released import Released
from lorica.run.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lorica.schedule import participation_schedule
from lorica.server.federation import Federation
from tests.models import adapted, one_at_a_time
from tests.records import TinyRecords

METHODS = sorted(registry())
PRIVACY = PrivacyConfig(epsilon=5.0, delta=1e-3, clip_norm=1.0, noise="reproducible")
ROUNDS, STEPS = 4, 2
TRAIN_BOTH = {
    *("fed-avg", "fedex-lora", "fedrot-lora", "fedsa-lora", "flex-lora", "flora", "het-lora", "la-lora", "lora-fair")
}


class Wrapped:
    """An engine around another one; what it does not do itself, that one does."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class Recorder(Wrapped):
    """An engine that keeps what passes, and may relabel clients."""

    def __init__(self, engine: LocalEngine) -> None:
        super().__init__(engine)
        self.requests, self.replies = [], []

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
    rank: int = 2,
    weighting: str = "uniform",
    optimizer: OptimizerConfig | None = None,
    secure_sum: bool = False,
    **server: Any,
) -> Federation:
    model = adapted("bert", seed, rank=rank, randomise=False)
    state = AdapterState(model.sites, model.read())
    method = make_method(MethodConfig(name=name, **(options or {})), model.sites)
    method.start(state, seed)
    schedule = participation_schedule(clients, ROUNDS, round(participation * clients), seed)
    plans = {
        number: plan_client(
            number, 20 + 5 * number, batch_size, steps * sum(number in who for who in schedule), privacy
        )
        for number in range(clients)
    }
    ledger = Ledger(folder / "ledger.sqlite")
    members = {
        number: Client(number, TinyRecords.texts(20 + 5 * number, seed=number), plans[number], ledger, "data", seed, 64)
        for number in range(clients)
    }
    optimizer = optimizer or OptimizerConfig(lr=0.5)
    driven = Server(
        model=state,
        rounds=ROUNDS,
        terms={number: plan.terms for number, plan in plans.items()},
        optimizer=optimizer,
        local_steps=steps,
        rates=learning_rates(optimizer, list(state.tensors)),
        seed=seed,
        **server,
    )
    engine = Recorder(LocalEngine(model, members))
    return Federation("run", method, driven, engine, plans, schedule, weighting, secure_sum=secure_sum)


def run(some: Federation, rounds: int = ROUNDS) -> Federation:
    for _ in range(rounds):
        some.round()
    return some


def dense(some: Federation, site: Site) -> Tensor:
    """What a site adds to its original weight, over `γ`: `B_merged A_merged + B R A`, by dense algebra, fp64."""
    tensors, merged = some.server.model.tensors, some.server.model.merged.get(site.name)
    b, a = tensors[site.b].double(), tensors[site.a].double()
    middle = tensors.get(site.r, torch.eye(site.rank)).double()
    total = b @ middle @ a
    return total if merged is None else total + merged[0].double() @ merged[1].double()


def snapshot(some: Federation) -> dict[str, Tensor]:
    return {site.name: dense(some, site) for site in some.server.model.sites}


@pytest.mark.parametrize("name", METHODS)
def test_shapes_and_names_stay_and_values_move(name: str, tmp_path: Path) -> None:
    some = federation(name, tmp_path)
    before, weights = dict(some.server.model.tensors), snapshot(some)
    run(some)
    after = some.server.model.tensors
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert all(torch.isfinite(value).all() for value in after.values())
    if not registry()[name].personal:
        assert all(not torch.equal(weights[key], value) for key, value in snapshot(some).items())


@pytest.mark.parametrize("name", METHODS)
def test_only_what_was_asked_for_travels_up(name: str, tmp_path: Path) -> None:
    """Updates of the trained tensors that are not personal, or sketches of sites; and a frozen factor stays put."""
    some = federation(name, tmp_path)
    for _ in range(ROUNDS):
        before = dict(some.server.model.tensors)
        count = len(some.engine.requests)
        some.round()
        trained = set()
        for requests, replies in zip(some.engine.requests[count:], some.engine.replies[count:], strict=True):
            for client, request in requests.items():
                work = request.work
                if isinstance(work, Projection):
                    assert set(replies[client]) == {f"sketch:{site}" for site in work.bases}
                    continue
                trained |= set(work.trained)
                expected = set(work.trained) - set(work.personal)
                if work.sketch_columns is not None:
                    sites = {name[:-2] for name in expected if name.endswith((".A", ".B"))}
                    expected = {name for name in expected if name[:-2] not in sites} | {f"sketch:{s}" for s in sites}
                assert set(replies[client]) == expected
        if not registry()[name].refuses.get("server_optimizer") and not registry()[name].personal:
            # A method that moves its tensors by the mean update leaves all others alone.
            for key, value in some.server.model.tensors.items():
                assert key in trained or torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_a_client_changes_nothing_but_what_it_trains(name: str, tmp_path: Path) -> None:
    """Right after a client's work, every weight of its model that it was not to train is what the server sent."""
    some = federation(name, tmp_path)
    engine = some.engine.engine
    checked = []

    class Inspecting(Wrapped):
        def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
            replies = {}
            for number in sorted(requests):
                replies |= engine.exchange({number: requests[number]})
                work = requests[number].work
                if isinstance(work, Training):
                    held, now = engine.clients[number].held, engine._model.read()
                    trained = {key.replace(".R", ".B") for key in work.trained}
                    for key in set(now) - trained:
                        middle = held.get(f"{key[:-2]}.R") if key.endswith(".B") else None
                        assert torch.equal(now[key], held[key] if middle is None else held[key] @ middle), key
                        checked.append(key)
            return replies

    some.engine = Inspecting(engine)
    run(some)
    assert bool(checked) != (name in TRAIN_BOTH)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("participation", [1.0, 0.67])
def test_the_ledger_holds_every_planned_release_and_no_more(name: str, participation: float, tmp_path: Path) -> None:
    some = run(federation(name, tmp_path, participation=participation))
    ledger = Ledger(tmp_path / "ledger.sqlite")
    releases = ledger.releases("data")
    assert len(releases) == sum(len(replies) for replies in some.engine.replies)
    for number, plan in some.plans.items():
        assert ledger.steps("run", number) == plan.max_steps
        assert plan.epsilon(ledger.steps("run", number)) <= 5.0


@pytest.mark.parametrize("name", METHODS)
def test_replies_are_released_tensors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor in every reply is of the type that only `privacy/` makes, and noise is in all of them."""
    seen = []
    encode = Reply.encode
    monkeypatch.setattr(Reply, "encode", lambda self: (seen.append(self), encode(self))[1])
    quiet = federation(name, tmp_path / "a")
    run(quiet, 1)
    assert seen
    assert all(isinstance(value, Released) for reply in seen for value in reply.tensors.values())
    other = federation(name, tmp_path / "b", seed=0)
    for client in other.engine.engine.clients.values():
        client.seed = 1  # Another noise and other batches; the sketch matrix is the server's business.
    run(other, 1)
    for mine, theirs in zip(quiet.engine.replies[0].values(), other.engine.replies[0].values(), strict=True):
        assert all(not torch.equal(mine[key], theirs[key]) for key in mine)


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
    assert_same_model(ordered, other)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("participation", [1.0, 0.67])
def test_resuming_equals_never_having_stopped(name: str, participation: float, tmp_path: Path) -> None:
    whole = run(federation(name, tmp_path / "whole", participation=participation))
    first = run(federation(name, tmp_path / "halves", participation=participation), 2)
    server = first.server
    save_checkpoint(
        tmp_path / "checkpoint",
        Checkpoint(2, server.model.tensors, server.model.merged, first.method.state_dict(), server.state_dict()),
    )
    found = load_checkpoint(tmp_path / "checkpoint")
    assert found is not None
    rest = federation(name, tmp_path / "halves", participation=participation)
    rest.method.load_state_dict(found.method)
    rest.server.model.assign(found.adapter)
    rest.server.model.merge(found.merged)
    rest.server.load_state_dict(found.server)
    rest.server.round = 2
    run(rest, 2)
    assert_same_model(whole, rest)


@pytest.mark.parametrize("name", METHODS)
def test_partial_participation_sends_what_changed_meanwhile(name: str, tmp_path: Path) -> None:
    """Whoever takes part starts from the server's model: all tensors, and all that was ever merged."""
    some = federation(name, tmp_path, clients=3, participation=0.34)
    clients = some.engine.engine.clients
    for _ in range(ROUNDS):
        sent: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
        exchange = some.engine.engine.exchange

        def record(requests: Any, exchange: Any = exchange, sent: Any = sent) -> Any:
            sent.append((dict(some.server.model.tensors), dict(some.server.model.merged)))
            return exchange(requests)

        some.engine.exchange = record
        (client,) = some.round().participants
        tensors, merged = sent[-1]
        assert clients[client].held.keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(clients[client].held[key], value), key
        assert clients[client].merged.keys() == merged.keys()
        for key, pair in merged.items():
            assert all(torch.equal(x, y) for x, y in zip(clients[client].merged[key], pair, strict=True))
    for number, plan in some.plans.items():
        assert Ledger(tmp_path / "ledger.sqlite").steps("run", number) == plan.max_steps


@pytest.mark.parametrize("name", [name for name in METHODS if registry()[name].about.exact])
def test_exact_methods_aggregate_the_weighted_mean_of_the_clients_models(name: str, tmp_path: Path) -> None:
    """At every site, the new model is `Σ_k w_k` of the clients' final models, read off their dense weights."""
    some = federation(name, tmp_path, weighting="records")
    total = sum(plan.records for plan in some.plans.values())
    engine = some.engine.engine
    finals: dict[int, dict[str, Tensor]] = {}

    class Reading(Wrapped):
        def exchange(self, requests: Mapping[int, Request]) -> dict[int, dict[str, Tensor]]:
            replies = {}
            for number in sorted(requests):
                replies |= engine.exchange({number: requests[number]})
                if isinstance(requests[number].work, Training):
                    finals[number] = {site.name: weight_of(engine._model, site) for site in engine._model.sites}
            return replies

    some.engine = Reading(engine)
    original = {site.name: weight_of(adapted("bert", 0, randomise=False), site) for site in engine._model.sites}
    for _ in range(ROUNDS):
        some.round()
        for site in some.server.model.sites:
            mean = sum(some.plans[k].records / total * finals[k][site.name] for k in finals)
            found = original[site.name] + site.scale * dense(some, site)
            torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-5)


def weight_of(model: AdaptedModel, site: Site) -> Tensor:
    """The site's weight as the model computes with it: frozen weight plus `γ B A`, fp64."""
    layer = model.peft_model.base_model.model.get_submodule(site.name)
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    return layer.get_base_layer().weight.double() + site.scale * (b.double() @ a.double())


@pytest.mark.parametrize("name", METHODS)
def test_one_client_without_noise_equals_centralised_training(name: str, tmp_path: Path) -> None:
    """One local step per exchange on all records: gradient descent on what is trained, by one-at-a-time autograd.

    A client's reply is compared, so that this holds for every method; what the server makes of it is compared for the
    exact ones above.
    """
    steps = 2 if name in {"deer", "la-lora"} else 1
    some = federation(name, tmp_path, clients=1, privacy="none", batch_size=20, steps=steps)
    records = TinyRecords.texts(20, seed=0)
    reference = adapted("bert", 0, randomise=False)
    compared = 0
    for _ in range(ROUNDS):
        exchange = some.engine.engine.exchange

        def compare(requests: Any, exchange: Any = exchange) -> Any:
            nonlocal compared
            work = requests[0].work
            start = dict(some.server.model.tensors)
            reply = exchange(requests)
            if isinstance(work, Training) and work.steps == 1 and work.local.damping is None and not work.personal:
                reference.merge(some.server.model.merged)
                reference.write(start)
                gradients = one_at_a_time(reference, records.batch(np.arange(20)))
                for key, update in reply[0].items():
                    if key.startswith("sketch:"):
                        continue
                    if key.endswith(".R"):
                        expected = start[f"{key[:-2]}.B"].T @ gradients[f"{key[:-2]}.B"].mean(0)
                    else:
                        expected = gradients[key].mean(0)
                    torch.testing.assert_close(update, -0.5 * expected, rtol=1e-4, atol=1e-6, msg=key)
                    compared += 1
            return reply

        some.engine.engine.exchange = compare
        some.round()
        some.engine.engine.exchange = exchange
    assert compared or name in {"deer", "la-lora", "fedsa-lora"}


def assert_same_model(one: Federation, other: Federation) -> None:
    """Bit for bit: tensors, what was merged, and what clients keep."""
    for key, value in one.server.model.tensors.items():
        assert torch.equal(value, other.server.model.tensors[key]), key
    assert one.server.model.merged.keys() == other.server.model.merged.keys()
    for key, pair in one.server.model.merged.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, other.server.model.merged[key], strict=True)), key
    for number, client in _clients(one).items():
        mine, theirs = client.personal("run"), _clients(other)[number].personal("run")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def _clients(some: Federation) -> dict[int, Client]:
    engine = some.engine
    while not isinstance(engine, LocalEngine):
        engine = engine.engine
    return engine.clients


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
def test_a_method_is_described(name: str) -> None:
    method = registry()[name]
    assert issubclass(method, Method)
    assert method.name == name
    assert "arXiv" in (method.__doc__ or "") or "ablation" in method.about.paper
    assert "DP:" in (method.__doc__ or "")
    assert all((method.about.paper, method.about.arxiv, method.about.trains, method.about.sends, method.about.privacy))
