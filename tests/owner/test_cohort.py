"""Client-level DP: a client's whole update is sampled, clipped and noised, as dense algebra and dp-accounting say."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting import NeighboringRelation, pld
from torch import Tensor

import lorica
from lorica.adapters.state import AdapterState
from lorica.config import MethodConfig, OptimizerConfig, PrivacyConfig, load
from lorica.engines.local import prepare_local
from lorica.errors import UserError
from lorica.local.optimizers import learning_rates
from lorica.methods.base import make_method
from lorica.methods.components import check_components
from lorica.methods.server import Server
from lorica.owner.cohort import Cohort
from lorica.privacy.mechanism import Terms, noisy_mean_update
from lorica.privacy.plan import plan_client, plan_cohort
from lorica.privacy.randomness import ReproducibleRandomness
from lorica.privacy.statement import Account, privacy_statement
from lorica.privacy.unit import CLIENT
from lorica.rehearsal import rehearse
from lorica.server.federation import Federation
from lorica.tasks.records import Records
from lorica.testing.federation import (
    RUN,
    UNCLIPPED,
    RecordingEngine,
    dense,
    run_rounds,
    tiny_federation,
    tiny_ledger,
)
from lorica.testing.models import tiny_bert
from lorica.testing.records import TinyRecords

NOISY = PrivacyConfig(
    unit="client", epsilon=None, noise_multiplier=1.0, delta=1e-3, clip_norm=0.05, noise="reproducible"
)


def cohort_federation(
    folder: Path, members: list[Records], privacy: PrivacyConfig, expected: int, method: str = "fed-avg", **options: Any
) -> Federation:
    """Three rounds of two local steps at rate 0.5, each on all records of a client."""
    rounds, model = 3, tiny_bert(0)
    state = AdapterState(model.sites, model.read())
    made = make_method(MethodConfig(name=method, **options), model.sites)
    made.start(state, 0)
    plan = plan_client(0, len(members), expected, rounds * made.client_level, privacy)
    everything = TinyRecords.texts(10)
    ledger = tiny_ledger(folder)
    cohort = Cohort(
        0,
        everything,
        plan,
        ledger,
        "data",
        0,
        1024,
        unit=CLIENT,
        members=members,
        optimizer=OptimizerConfig(lr=0.5),
        steps=2,
        batch_size=1000,
    )
    optimizer = OptimizerConfig(lr=1.0)
    server = Server(
        model=state,
        rounds=rounds,
        terms={0: plan.terms},
        optimizer=optimizer,
        local_steps=1,
        full_rates=learning_rates(optimizer, list(state.tensors)),
        seed=0,
    )
    engine = RecordingEngine(model, {0: cohort}, server)
    return Federation(RUN, made, server, engine, {0: plan}, [[0]] * rounds, "uniform", trusted=True)


def ordinary(folder: Path, members: list[Records], method: str) -> Federation:
    """An ordinary federation of these clients of 20 records, without noise and clip."""
    some = tiny_federation(
        method, folder, privacy=UNCLIPPED, batch_size=20, rounds=3, optimizer=OptimizerConfig(lr=0.5)
    )
    for number, client in some.engine.clients.items():
        client.records = members[number]
        client.plan = replace(client.plan, records=20, terms=Terms(1.0, 20, math.inf, 0.0))
    some.plans = {number: client.plan for number, client in some.engine.clients.items()}
    return some


def randomness(seed: int = 0) -> ReproducibleRandomness:
    return ReproducibleRandomness(seed, 1, 1, 0)


def updates(count: int, scale: float = 1.0) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    return [
        {"a": scale * torch.randn(3, 4, generator=draws), "b": torch.randn(5, generator=draws)} for _ in range(count)
    ]


SHAPES = {"a": torch.Size([3, 4]), "b": torch.Size([5])}


def test_the_mean_update_is_that_of_clipped_updates_over_the_expected_number() -> None:
    given = [
        {name: size * value for name, value in one.items()} for one, size in zip(updates(6), range(6), strict=True)
    ]
    found = noisy_mean_update(given.__getitem__, 6, SHAPES, Terms(1.0, 4, 3.0, 0.0), randomness())
    flat = [torch.cat([one["a"].flatten(), one["b"]]).double() for one in given]
    clipped = [one * min(1.0, 3.0 / max(float(one.norm()), 1e-9)) for one in flat]
    assert [float(one.norm()) > 3 for one in flat] == [False, *[True] * 5]
    expected = sum(clipped) / 4
    torch.testing.assert_close(
        torch.cat([found["a"].tensor.flatten(), found["b"].tensor]).double(), expected, rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("left_out", range(5))
def test_one_client_moves_the_mean_by_at_most_the_clip_over_the_expected_number(left_out: int) -> None:
    """The number in the sample does not appear, which would move all other terms too."""
    terms, given = Terms(1.0, 4, 0.7, 0.0), updates(5, 100.0)
    others = [one for number, one in enumerate(given) if number != left_out]
    whole, rest = (
        noisy_mean_update(some.__getitem__, len(some), SHAPES, terms, randomness()) for some in (given, others)
    )
    moved = torch.cat([(whole[name].tensor - rest[name].tensor).flatten() for name in SHAPES])
    assert 0.17 < moved.norm() <= 0.7 / 4


@pytest.mark.integration
def test_each_client_is_in_the_sample_with_the_stated_probability() -> None:
    one, shapes = {"a": torch.ones(1)}, {"a": torch.Size([1])}
    sizes = [
        4 * float(noisy_mean_update(lambda _: one, 10, shapes, Terms(0.3, 4, 5.0, 0.0), randomness(seed))["a"].tensor)
        for seed in range(2000)
    ]
    mean, variance = 3.0, 10 * 0.3 * 0.7
    assert abs(sum(sizes) / 2000 - mean) < 5 * math.sqrt(variance / 2000)
    assert abs(float(torch.tensor(sizes).var()) - variance) < 0.4


def test_an_empty_sample_is_noise_of_the_stated_size() -> None:
    terms = Terms(0.5, 4, 0.7, 3.0)
    draws = [
        noisy_mean_update(updates(0).__getitem__, 0, SHAPES, terms, randomness(seed))["a"].tensor
        for seed in range(2000)
    ]
    noise = torch.stack(draws).double()
    deviation = 3.0 * 0.7 / 4
    assert noise.mean(0).abs().max() < 5 * deviation / math.sqrt(2000)
    assert (noise.var(0) / deviation**2 - 1).abs().max() < 5 * math.sqrt(2 / 2000)


@pytest.mark.parametrize("method", ["fed-avg", "ffa-lora"])
def test_without_noise_and_clip_it_is_federated_averaging_of_all_clients(method: str, tmp_path: Path) -> None:
    """Against the ordinary federation of the same clients, two full batches a round."""
    members: list[Records] = [TinyRecords.texts(20, number) for number in range(3)]
    bare = UNCLIPPED.model_copy(update={"unit": "client"})
    one = run_rounds(cohort_federation(tmp_path / "one", members, bare, 3, method))
    other = run_rounds(ordinary(tmp_path / "other", members, method))
    for name, value in one.server.model.tensors.items():
        torch.testing.assert_close(value, other.server.model.tensors[name], rtol=1e-4, atol=1e-6)
    assert any(dense(one.server.model, site).any() for site in one.server.model.sites)


@pytest.mark.parametrize("clip", [None, 0.02])
def test_fed_power_finds_the_mean_of_clipped_products(clip: float | None, tmp_path: Path) -> None:
    """With as many columns as the maps have, nothing is lost but in the truncation."""
    members: list[Records] = [TinyRecords.texts(20, number) for number in range(3)]
    bare = UNCLIPPED.model_copy(update={"unit": "client", "clip_norm": clip})
    one = cohort_federation(tmp_path / "one", members, bare, 3, "fed-power", oversampling=14)
    one.round()
    other = ordinary(tmp_path / "other", members, "fed-avg")
    other.round()
    (ends,), (replies,) = other.engine.ends, other.engine.replies
    sites = one.server.model.sites
    products = {
        client: {site.name: end.tensors[site.b].double() @ end.tensors[site.a].double() for site in sites}
        for client, end in ends.items()
    }
    head = {
        client: torch.cat([reply["head.weight"].flatten(), reply["head.bias"]]) for client, reply in replies.items()
    }
    norms = {
        client: math.sqrt(sum(float(value.square().sum()) for value in [*own.values(), head[client].double()]))
        for client, own in products.items()
    }
    scales = {client: 1.0 if clip is None else min(1.0, clip / norm) for client, norm in norms.items()}
    assert clip is None or max(scales.values()) < 0.9
    for site in sites:
        mean = sum(scales[client] * own[site.name] for client, own in products.items()) / 3
        u, s, vt = torch.linalg.svd(mean)
        best = (u[:, :2] * s[:2]) @ vt[:2]
        assert (dense(one.server.model, site) - best).norm() <= 1e-4 * best.norm()


def test_fed_power_takes_two_steps_a_round(tmp_path: Path) -> None:
    members: list[Records] = [TinyRecords.texts(3, number) for number in range(6)]
    some = run_rounds(cohort_federation(tmp_path, members, NOISY, 3, "fed-power"))
    rows = tiny_ledger(tmp_path).releases("data")
    assert [(row.round, row.steps) for row in rows] == [(1, 1), (1, 1), (2, 1), (2, 1), (3, 1), (3, 1)]
    assert sum(row.steps for row in rows) == some.plans[0].max_steps
    first, second = some.engine.replies[0][0], some.engine.replies[1][0]
    assert first.keys() == {"head.weight", "head.bias", *(f"sketch:{site.name}" for site in some.server.model.sites)}
    assert second.keys() == {f"sketch:{site.name}" for site in some.server.model.sites}


@pytest.mark.parametrize("method", ["fed-avg", "fed-power"])
def test_another_clients_records_move_a_release_by_at_most_the_clip(method: str, tmp_path: Path) -> None:
    """The same seed, so the same sample and noise; the releases of the first round are compared."""
    members: list[Records] = [TinyRecords.texts(4, number) for number in range(8)]
    changed = [*members[:3], TinyRecords.texts(4, 77), *members[4:]]
    privacy = NOISY.model_copy(update={"noise_multiplier": 1e-3})
    runs = [
        cohort_federation(tmp_path / str(place), some, privacy, 8, method)
        for place, some in enumerate((members, changed))
    ]
    for some in runs:
        some.round()
    one, other = (some.engine.replies[0][0] for some in runs)
    moved = torch.cat([(one[name] - other[name]).flatten() for name in one])
    # Replacing a client is leaving it out and adding another one.
    assert 1e-3 < moved.norm() <= 2 * 0.05 / 8


def test_epsilon_is_that_of_poisson_sampled_clients(tmp_path: Path) -> None:
    config = load(
        None, ["privacy.unit=client", "federation.clients=1000", "federation.participation=0.2", "federation.rounds=30"]
    )
    plan = plan_cohort(config)
    accountant = pld.PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    event = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(plan.noise_multiplier))
    expected = accountant.compose(event, 30).get_epsilon(config.privacy.delta)
    assert plan.epsilon() == pytest.approx(expected, rel=2e-3)
    assert plan.epsilon() <= 3.0
    assert (plan.records, plan.terms.batch_size, plan.max_steps) == (1000, 200, 30)


@pytest.mark.parametrize("method", ["fed-avg", "ffa-lora", "as-lora", "ro-lora", "random-lora"])
def test_the_ledger_has_a_row_a_round_and_repeats_none(method: str, tmp_path: Path) -> None:
    members: list[Records] = [TinyRecords.texts(3, number) for number in range(6)]
    some, again = (cohort_federation(tmp_path, members, NOISY, 3, method) for _ in range(2))
    some.round()
    again.round()
    assert len(tiny_ledger(tmp_path).releases("data")) == 1
    for name, value in some.server.model.tensors.items():
        assert torch.equal(value, again.server.model.tensors[name])
    run_rounds(again)
    rows = tiny_ledger(tmp_path).releases("data")
    assert [(row.round, row.steps, row.unit, row.sampling_rate) for row in rows] == [
        (number, 1, CLIENT, 0.5) for number in (1, 2, 3)
    ]


SMALL = ["model.threads=1", "federation.clients=30", "federation.partition=iid", "federation.weights=uniform"]
BRIEF = ["federation.rounds=1", "federation.local_steps=1", "federation.batch_size=8", "federation.participation=0.3"]
UNIT = ["privacy.unit=client", "privacy.epsilon=null", "privacy.noise_multiplier=1", "privacy.delta=1e-3"]


@pytest.mark.integration
def test_a_run_says_so_and_hides_who_took_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = [f"output={tmp_path}", f"privacy.ledger={tmp_path}/ledger.sqlite", "method.name=ffa-lora"]
    with caplog.at_level(logging.WARNING):
        result = lorica.Experiment(load(None, [*SMALL, *BRIEF, *UNIT, *own])).run()
    assert any("some hundred clients" in message for message in caplog.messages)
    privacy = json.loads((result.folder / "privacy.json").read_text())
    assert (privacy["unit"], privacy["private_release"]) == ("client", True)
    (row,) = privacy["clients"]
    assert (row["clients"], row["batch_size"], row["steps"]) == (30, 9, 1)
    assert row["epsilon"] == pytest.approx(plan_cohort(load(None, [*SMALL, *BRIEF, *UNIT])).epsilon())
    assert "except the server, which is trusted" in privacy["adversary"]
    assert "one client contributes zero to every round" in privacy["relation"]
    for line in (result.folder / "metrics.jsonl").read_text().splitlines():
        assert not {"participants", "missing", "bytes_up", "bytes_down"} & json.loads(line).keys()
    assert not (result.folder / "partition.json").exists()
    card = (result.adapter / "README.md").read_text()
    assert "All clients have the same guarantee" in card
    assert "never left its owners" not in card
    assert "Which clients took part is secret" in (result.folder / "report.html").read_text()


@pytest.mark.integration
@pytest.mark.parametrize("method", ["ffa-lora", "fed-power"])
def test_the_epsilon_of_a_round_counts_its_exchanges(method: str, tmp_path: Path) -> None:
    own = [f"output={tmp_path}", f"privacy.ledger={tmp_path}/ledger.sqlite", f"method.name={method}"]
    result = lorica.Experiment(load(None, [*SMALL, *BRIEF, *UNIT, *own])).run()
    *_, last = map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
    (row,) = json.loads((result.folder / "privacy.json").read_text())["clients"]
    assert last["epsilon"] == pytest.approx(row["epsilon"], abs=1e-6)


def test_a_dry_run_trains_on_public_records_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [f"output={tmp_path}", f"privacy.ledger={tmp_path}/ledger.sqlite", "method.name=ffa-lora"]
    config, seen = load(None, [*SMALL, *BRIEF, *UNIT, *own]), set()
    update = Cohort._update

    def watched(self: Cohort, *given: Any) -> dict[str, Tensor]:
        seen.update(map(bytes, given[4].digests))
        return update(self, *given)

    monkeypatch.setattr(Cohort, "_update", watched)
    found = rehearse(config)
    assert not (tmp_path / "ledger.sqlite").exists()
    public = prepare_local(config)[0].task.test
    assert seen
    assert seen <= set(map(bytes, public.digests))
    assert found["clients"][0]["epsilon"] == pytest.approx(plan_cohort(config).epsilon())


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["method.name=flex-lora"], "method.name"),
        (["method.name=as-lora", "method.score=last-step-energy"], "method.name"),
        (["engine=flower"], "engine"),
        (["federation.secure_sum=true"], "federation.secure_sum"),
        (["server.aggregate=median"], "server.aggregate"),
        (["local.scaffold=true"], "local.scaffold"),
        (["federation.weights=noise"], "federation.weights"),
        (["federation.min_clients=3"], "federation.min_clients"),
        (["federation.private_test=0.1"], "federation.private_test"),
        (
            [
                "privacy.noise_against=sums",
                "federation.secure_sum=true",
                "federation.min_clients=3",
                "federation.local_steps=1",
            ],
            "federation.secure_sum",
        ),
    ],
)
def test_what_needs_more_than_the_mean_is_refused(overrides: list[str], named: str) -> None:
    config = load(None, [*SMALL, *UNIT, "method.name=fed-avg", *overrides])
    with pytest.raises(UserError, match=rf"^{named.replace('.', '[.]')} = .*privacy.unit = client"):
        check_components(config, make_method(config.method, []))


def test_a_delta_of_one_over_the_clients_is_refused_or_said() -> None:
    with pytest.raises(UserError, match="one over the number of clients"):
        plan_client(0, 50, 10, 3, NOISY.model_copy(update={"delta": 0.02, "noise": "secure"}))
    plan = plan_client(0, 50, 10, 3, NOISY.model_copy(update={"delta": 0.02}))
    statement = privacy_statement({0: plan}, {0: Account(3, 3)}, None, CLIENT)
    assert any("one over the number of clients" in line for line in statement["not_covered"])
