"""Noise shared by the members of a secure sum: how much is in every sum, what is refused, and what a sum reveals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from lorica.config import OptimizerConfig, load
from lorica.errors import UserError
from lorica.local.step import LocalStep
from lorica.messages import Request, decode_plan, encode_plan
from lorica.methods.base import make_method
from lorica.methods.components import check_components
from lorica.privacy.home import Home
from lorica.privacy.ledger import Ledger
from lorica.privacy.mechanism import Terms
from lorica.privacy.plan import ClientPlan, Refused, plan_client, plan_run
from lorica.privacy.shared_noise import summand_limits
from lorica.privacy.statement import Account, privacy_statement
from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.quantisation import dequantise, quantise
from lorica.secure_sum.setup import Setup
from lorica.server.federation import Federation, TooFewReplies, client_weights
from lorica.server.shared_noise import shared_setup, shared_terms
from lorica.testing.federation import PRIVACY, run_rounds, tiny_federation
from tests.methods.conftest import METHODS, REGISTRY

SHARED = PRIVACY.model_copy(update={"noise_against": "sums"})
WEIGHTINGS = ["uniform", "records", "noise"]


def plans_of(records: list[int], members: int, colluding: int) -> dict[int, ClientPlan]:
    """Plans with different noise multipliers, as different sampling rates need them."""
    plans = {}
    for client, count in enumerate(records):
        changes = {"noise_multiplier": 2.0 - 0.3 * client, "colluding": colluding}
        plans[client] = plan_client(client, count, 16, 10, SHARED.model_copy(update=changes), members)
    return plans


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("members", "colluding"), [(3, 1), (4, 0), (4, 2), (5, 1)])
def test_any_honest_survivors_add_enough_noise_for_every_record(weighting: str, members: int, colluding: int) -> None:
    """For every set of survivors and of colluders among them, by adding up the variances."""
    plans = plans_of([40, 70, 130, 300, 310], members, colluding)
    weights = client_weights(weighting, list(plans.values()))
    terms = shared_terms(plans, weights)
    # What one record moves the sum by, times its noise multiplier.
    needed = max(
        weights[client] * plan.shared.noise_multiplier * plan.terms.clip_norm / plan.terms.batch_size
        for client, plan in plans.items()
        if plan.shared is not None
    )
    found = []
    for size in range(members, 6):
        for survivors in itertools.combinations(plans, size):
            for colluders in itertools.combinations(survivors, colluding):
                honest = set(survivors) - set(colluders)
                found.append(math.sqrt(sum((weights[one] * terms[one].noise_std) ** 2 for one in honest)))
    assert min(found) >= needed * (1 - 1e-12)
    # And no more than needed: fewer survivors, or one more colluder, would not be enough.
    assert min(found) == pytest.approx(needed, rel=1e-9)
    if weighting == "noise":
        shares = {client: plan.noise_std / math.sqrt(members - colluding) for client, plan in plans.items()}
        assert {client: own.noise_std for client, own in terms.items()} == pytest.approx(shares)


def test_a_plan_states_both_guarantees_and_travels() -> None:
    privacy = SHARED.model_copy(update={"epsilon": 1.0, "noise_multiplier": None})
    plan = plan_client(0, 100, 16, 10, privacy, 5)
    alone = plan_client(0, 100, 16, 10, privacy.model_copy(update={"noise_against": "replies"}))
    assert plan.noise_multiplier == alone.terms.noise_multiplier == pytest.approx(2 * plan.terms.noise_multiplier)
    assert plan.epsilon() == alone.epsilon() <= 1.0
    accountant = RdpAccountant()
    step = PoissonSampledDpEvent(0.16, GaussianDpEvent(plan.terms.noise_multiplier))
    bound = accountant.compose(SelfComposedDpEvent(step, 10)).get_epsilon(plan.delta)
    assert 1.0 < plan.epsilon_own_noise() <= bound
    assert decode_plan(encode_plan(plan)) == plan
    assert plan.agrees_with(plan)
    assert plan.shared is not None
    for other in (
        replace(plan, shared=replace(plan.shared, min_clients=6)),
        replace(plan, shared=replace(plan.shared, noise_multiplier=1.01 * plan.noise_multiplier)),
        replace(plan, terms=replace(plan.terms, noise_multiplier=0.99 * plan.terms.noise_multiplier)),
        replace(plan, shared=None),
    ):
        assert not plan.agrees_with(other)
        assert not other.agrees_with(plan)


def federation(folder: Path, method: str = "ro-lora", **changes: Any) -> Federation:
    terms = {"privacy": SHARED, "clients": 4, "min_clients": 3, "steps": 1, "secure_sum": True, "weighting": "noise"}
    return tiny_federation(method, folder, **(terms | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_sum_has_the_noise_that_the_server_expects(weighting: str, tmp_path: Path) -> None:
    """Through masks and quantisation. The gradients are so small beside the noise that the step is almost all noise."""
    loud = SHARED.model_copy(update={"noise_multiplier": 40.0})
    some = federation(tmp_path, "ffa-lora", privacy=loud, weighting=weighting, optimizer=OptimizerConfig(lr=0.5))
    before = dict(some.server.model.tensors)
    some.round()
    moved = torch.cat([(some.server.model.tensors[name] - before[name]).flatten() for name in before]).double()
    moved = moved[moved != 0]
    weights = client_weights(weighting, list(some.plans.values()))
    expected = 0.5 * math.sqrt(sum((weights[one] * some.server.terms[one].noise_std) ** 2 for one in weights))
    assert float(moved.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * len(moved)))
    lone = [(0.5 * weights[one] * plan.noise_std) for one, plan in some.plans.items()]
    # All four members together have more noise than one record needs, by √(4/2) if all add the same.
    assert expected >= max(lone) * math.sqrt(2) * (1 - 1e-9)


REFUSING = {"secure_sum", "shared_noise"}


@pytest.mark.parametrize("name", [name for name in METHODS if not REFUSING & REGISTRY[name].refuses.keys()])
def test_methods_run_with_shared_noise(name: str, tmp_path: Path) -> None:
    some = run_rounds(federation(tmp_path, name, rounds=2), 2)
    assert all(bool(torch.isfinite(value).all()) for value in some.server.model.tensors.values())
    rows = Ledger(tmp_path / "ledger.sqlite", Home(tmp_path / "home")).releases()
    assert {row.noise_multiplier for row in rows} == {1.0}
    own = [row.own_noise_multiplier for row in rows]
    assert own == pytest.approx([1 / math.sqrt(2)] * len(rows))


@pytest.mark.parametrize("name", [name for name in METHODS if "shared_noise" in REGISTRY[name].refuses])
def test_other_methods_refuse_shared_noise_with_the_reason(name: str) -> None:
    config = load(overrides=[*CONFIG, f"method.name={name}"])
    method = REGISTRY[name](REGISTRY[name].Options(), [])
    with pytest.raises(UserError, match=r"^privacy\.noise_against"):
        check_components(config, method)


CONFIG = [
    "privacy.noise_against=sums",
    "federation.secure_sum=true",
    "federation.min_clients=5",
    "federation.local_steps=1",
]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("federation.secure_sum=false", r"privacy\.noise_against"),
        ("federation.min_clients=null", r"federation\.min_clients"),
        ("federation.local_steps=2", r"federation\.local_steps"),
        ("privacy.colluding=4", r"privacy\.colluding"),
        ("optimizer.name=adamw", r"optimizer\.name"),
        ("local.scaled_gd=true", r"local\.scaled_gd"),
        ("local.fedprox=0.1", r"local\.fedprox"),
    ],
)
def test_what_makes_shared_noise_unsound_is_refused_by_both_sides(override: str, key: str) -> None:
    config = load(overrides=[*CONFIG, override])
    with pytest.raises(UserError, match=f"^{key}"):
        plan_run(config, 0, 1000)
    with pytest.raises(UserError, match=f"^{key}"):
        check_components(config, make_method(config.method, []))


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[tuple[Federation, dict[int, Request], Agreement]]:
    """The requests and the agreement of a first round, as client 0 gets them."""
    some = federation(tmp_path)
    seen: list[Any] = []

    def keep(requests: dict[int, Request], agreement: Agreement) -> tuple[list[int], dict[str, torch.Tensor]]:
        seen.extend([requests, agreement])
        return [], {}

    some.engine.sum = keep  # type: ignore[method-assign, assignment]
    with pytest.raises(TooFewReplies):
        some.round()
    yield some, seen[0], seen[1]
    # Nothing was charged for a request that was refused.
    assert Ledger(tmp_path / "ledger.sqlite", Home(tmp_path / "home")).releases() == []


def noise(**changes: Any) -> Callable[[Request, Agreement], tuple[Request, Agreement]]:
    def change(request: Request, agreement: Agreement) -> tuple[Request, Agreement]:
        assert agreement.noise is not None
        values = {key: value(agreement.noise) if callable(value) else value for key, value in changes.items()}
        return request, replace(agreement, noise=replace(agreement.noise, **values))

    return change


def setup(**changes: Any) -> Callable[[Request, Agreement], tuple[Request, Agreement]]:
    def change(request: Request, agreement: Agreement) -> tuple[Request, Agreement]:
        values = {key: value(agreement.setup) for key, value in changes.items()}
        return request, replace(agreement, setup=replace(agreement.setup, **values))

    return change


def work(**changes: Any) -> Callable[[Request, Agreement], tuple[Request, Agreement]]:
    """Other work, which all members were told to do."""

    def change(request: Request, agreement: Agreement) -> tuple[Request, Agreement]:
        values = {key: value(request.work) if callable(value) else value for key, value in changes.items()}
        request = replace(request, work=replace(request.work, **values))  # type: ignore[type-var]
        assert agreement.noise is not None
        digest = request.work.common_digest(request.tensors)  # type: ignore[union-attr]
        return request, replace(agreement, noise=replace(agreement.noise, work=digest))

    return change


ATTACKS: dict[str, tuple[Callable[[Request, Agreement], Any], str]] = {
    "a single reply": (lambda request, agreement: (request, None), "not be part of a sum"),
    "a sum without shared noise": (lambda request, some: (request, replace(some, noise=None)), "not be part of a sum"),
    "the others were told of more members": (noise(min_clients=100), "min_clients = 100"),
    "the others were told of fewer colluders": (noise(colluding=0), "colluding = 0"),
    "less noise in the sum": (noise(std=lambda some: 0.99 * some.std), "noise in the sum"),
    "more noise than this client's part": (noise(std=lambda some: 1.01 * some.std), "its part"),
    "the others were told another learning rate": (noise(work="0" * 64), "other work"),
    "a bound that clips": (setup(bound=lambda some: some.bound / 100), "bound"),
    "a grid as coarse as the noise": (setup(bound=lambda some: some.bound * 1e7), "too short"),
    "two steps": (work(steps=2), "one step"),
    "an optimiser that rescales": (work(optimizer=OptimizerConfig(name="adamw")), "one step"),
    "an energy": (work(last_step_energy=True), "one step"),
    "a sketch": (work(sketch_columns=4), "one step"),
    "a personal tensor": (work(personal=lambda some: some.trained[:1]), "one step"),
    "fewer ranks": (work(rank=1), "one step"),
    "a filter": (work(local=LocalStep(smoothing="gaussian")), "one step"),
    "a preconditioner": (work(local=LocalStep(damping=0.1)), "one step"),
    "a penalty": (work(local=LocalStep(tail_penalty=0.1)), "one step"),
    "a proximal term": (work(local=LocalStep(proximal=0.1)), "one step"),
    "alternating steps": (work(local=LocalStep(alternate=True)), "one step"),
    "a correction": (work(corrections=lambda some: {some.trained[0]: torch.ones(2)}), "one step"),
    "less noise than its part": (
        work(terms=lambda some: replace(some.terms, noise_multiplier=0.9 * some.terms.noise_multiplier)),
        "its part",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_server_cannot_take_the_noise_of_the_others_away(
    attack: str, asked: tuple[Federation, dict[int, Request], Agreement]
) -> None:
    some, requests, agreement = asked
    change, reason = ATTACKS[attack]
    request, changed = change(requests[0], agreement)
    engine: Any = some.engine
    with pytest.raises(Refused, match=reason):
        engine.clients[0].reply_to(engine._model, request, changed)


def test_an_honest_sum_is_answered(asked: tuple[Federation, dict[int, Request], Agreement], tmp_path: Path) -> None:
    """The other side of the attacks: the same call without a change."""
    some, requests, agreement = asked
    engine: Any = some.engine
    other = federation(tmp_path / "again")
    other_engine: Any = other.engine
    assert other_engine.clients[0].reply_to(other_engine._model, requests[0], agreement)
    assert engine.clients[0].plan == other_engine.clients[0].plan


def test_members_that_were_told_different_noise_get_no_sum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that tells the others to add less gets nothing from client 0, whose keys belong to other terms."""
    some = federation(tmp_path)
    engine: Any = some.engine
    run_stage, asked = engine._run_stage, []

    def lie(number: int, request: Request, question: str) -> bytes:
        if number != 0:
            changed = question.replace('"colluding": 1', '"colluding": 0')
            asked.append(changed != question)
            question = changed
        return bytes(run_stage(number, request, question))

    engine._run_stage = lie
    with pytest.raises(UserError, match="colluding = 0"):
        some.round()
    assert any(asked)
    assert "client 0 refuses" in caplog.text


def test_a_sum_with_fewer_members_than_the_noise_is_for_is_refused(tmp_path: Path) -> None:
    """`min_clients` holds after dropouts too, whatever threshold the server sets."""
    some = federation(tmp_path, clients=5, min_clients=4)
    some.min_clients = 3
    engine: Any = some.engine
    run_stage = engine._run_stage

    def leave(number: int, request: Request, question: str) -> bytes:
        if number in (3, 4):
            from lorica.secure_sum.setup import SummationError

            raise SummationError("gone")
        return bytes(run_stage(number, request, question))

    engine._run_stage = leave
    with pytest.raises(TooFewReplies):
        some.round()


def test_words_are_as_long_as_the_noise_needs(asked: tuple[Federation, dict[int, Request], Agreement]) -> None:
    some, requests, agreement = asked
    weights = dict(agreement.weights)
    assert agreement.setup.bits == 32
    tiny = {
        client: replace(request, work=replace(request.work, terms=replace(request.work.terms, sampling_rate=1e-9)))  # type: ignore[type-var, union-attr]
        for client, request in requests.items()
    }
    wide = shared_setup(agreement.setup, tiny, weights, some.server.model.tensors)
    assert wide.bits == 64
    smallest = min(weights[client] * 0.5 * request.work.terms.noise_std for client, request in tiny.items())  # type: ignore[union-attr]
    assert wide.step <= smallest / 16


def test_rounding_to_the_grid_adds_only_a_uniform_error() -> None:
    """The sum of rounded summands against that of the exact ones, whose noise it hides: means and variances."""
    terms = Terms(0.1, 16, 1.0, 1.0)
    bound, _ = summand_limits(terms, 0.25, {"x": 0.5}, 0.0, {"x": torch.zeros(1)})
    s = 0.25 * 0.5 * terms.noise_std
    draw = torch.Generator().manual_seed(0)
    setup = Setup("x", 4, 3, 32, bound)
    # The coarsest grid that a client accepts.
    while setup.step * 2 <= s / 16:
        setup = replace(setup, bound=setup.bound * 2)
    values = [(s * torch.randn(200_000, generator=draw, dtype=torch.float64)).float() for _ in range(4)]
    words = np.sum([quantise(setup, {"x": value}) for value in values], axis=0, dtype=setup.word)
    error = dequantise(setup, words, {"x": (200_000,)})["x"].double() - sum(value.double() for value in values)
    assert float(error.abs().max()) <= 4 * setup.step / 2 + 1e-6 * s
    assert float(error.var()) == pytest.approx(4 * setup.step**2 / 12, rel=0.02)
    exact = sum(value.double() for value in values)
    assert abs(float((error * exact).mean())) < 5 * float(error.std() * exact.std()) / math.sqrt(200_000)  # type: ignore[union-attr]


def test_what_a_sum_reveals_is_within_its_guarantee(tmp_path: Path) -> None:
    """An attack on one record, by a server that sees sums and knows the noise of a colluding owner.

    The gradient of the attacked record has norm C along a known direction; it is in the batch or not. The score is the
    sum, less what the colluder sent, along that direction. Its distance in standard deviations is 1/σ for the exact
    Gaussian mechanism, and the lower bound on ε from the error rates (Jagielski et al., arXiv 2006.07709) must not
    exceed the ε of one step.
    """
    owners, members, colluding, batch, trials = 4, 4, 1, 8, 40_000
    privacy = SHARED.model_copy(update={"noise_multiplier": 1.5, "colluding": colluding, "delta": 1e-3})
    plans = {client: plan_client(client, batch, batch, 1, privacy, members) for client in range(owners)}
    weights = client_weights("noise", list(plans.values()))
    terms = shared_terms(plans, weights)
    from lorica.privacy.mechanism import add_noise
    from lorica.privacy.randomness import SecureRandomness

    def summand(client: int, signal: float) -> torch.Tensor:
        own, value = terms[client], torch.full((trials,), signal, dtype=torch.float64)
        (draws,) = SecureRandomness().normal([trials])
        gradient = add_noise(value, own.noise_multiplier * own.clip_norm, draws) / own.batch_size
        return weights[client] * gradient

    scores = {}
    for present in (0.0, plans[0].terms.clip_norm):
        sent = [summand(client, present if client == 0 else 0.0) for client in range(owners)]
        scores[present] = (sum(sent) - sent[-1], sent[0])
    claims = [
        (plans[0].noise_multiplier, plans[0].epsilon()),
        (plans[0].terms.noise_multiplier, plans[0].epsilon_own_noise()),
    ]
    for place, (sigma, claimed) in enumerate(claims):
        without, within = (scores[present][place].numpy() for present in scores)
        shift, deviation = within.mean() - without.mean(), math.sqrt((within.var() + without.var()) / 2)
        # More than five standard errors of the shift's estimate.
        assert deviation / shift == pytest.approx(sigma, rel=0.06)
        bound = 0.0
        for threshold in np.quantile(within, [0.5, 0.9, 0.99]):
            hits, alarms = int((within > threshold).sum()), int((without > threshold).sum())
            power = stats.beta.ppf(0.025, hits, trials - hits + 1)
            level = stats.beta.ppf(0.975, alarms + 1, trials - alarms)
            bound = max(bound, math.log((power - 1e-3) / level))
        assert 0.4 * claimed < bound <= claimed
        if place == 1:
            # The attack has teeth: the own reply reveals more than the guarantee of the sum allows.
            assert bound > plans[0].epsilon()


def test_the_statement_names_the_adversary_and_gives_both_guarantees() -> None:
    plans = plans_of([100, 200], 4, 1)
    accounts = {client: Account(plan.max_steps, 3) for client, plan in plans.items()}
    statement = privacy_statement(plans, accounts, 1.0)
    assert "sums over at least 4 owners" in statement["adversary"]
    assert "1 other owner that colludes" in statement["adversary"]
    for row, plan in zip(statement["clients"], plans.values(), strict=True):
        assert row["noise_multiplier"] == pytest.approx(math.sqrt(3) * row["own_noise_multiplier"])
        assert row["epsilon"] == plan.epsilon() < row["epsilon_own_noise"] == plan.epsilon_own_noise()
    own = privacy_statement({0: replace(plans[0], shared=None)}, {0: accounts[0]}, 1.0)
    assert "every message" in own["adversary"]
    assert "epsilon_own_noise" not in own["clients"][0]
