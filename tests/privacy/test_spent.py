"""The ε shown after each round, against a direct computation for every client."""

from __future__ import annotations

import math

import pytest

from lorica.config import PrivacyConfig
from lorica.privacy import spent as spent_module
from lorica.privacy.accounting import Composition, Steps, epsilon
from lorica.privacy.plan import ClientPlan, plan_client
from lorica.privacy.spent import Spent
from lorica.schedule import participation_counts, participation_schedule
from tests.tiers import integration

PRIVACY = PrivacyConfig(epsilon=None, noise_multiplier=1.5, delta=1e-3, clip_norm=1.0)
SHARED = PRIVACY.model_copy(update={"noise_against": "sums"})
STEPS = 2


def plans(privacy: PrivacyConfig, sizes: list[int]) -> dict[int, ClientPlan]:
    return {client: plan_client(client, n, 10, 20, privacy, min_clients=3) for client, n in enumerate(sizes)}


def largest(own: dict[int, ClientPlan], done: list[list[int]]) -> tuple[float, float]:
    counts = {client: STEPS * sum(client in who for who in done) for client in own}
    return (
        max(plan.epsilon(counts[client]) for client, plan in own.items()),
        max(plan.epsilon_own_noise(counts[client]) for client, plan in own.items()),
    )


@pytest.mark.integration
@pytest.mark.parametrize("compositions", [256, 1])
def test_after_every_round_it_is_the_largest_of_all_clients(monkeypatch: pytest.MonkeyPatch, compositions: int) -> None:
    monkeypatch.setattr(spent_module, "MOST_COMPOSITIONS", compositions)
    own = plans(SHARED, [40, 50, 50, 80])
    schedule = participation_schedule(4, 6, 3, seed=1)
    whole, resumed = Spent([], STEPS), Spent(schedule[:4], STEPS)
    for number, participants in enumerate(schedule, 1):
        found = whole.add(participants, own)
        if number > 4:
            again = resumed.add(participants, own)
            assert again == pytest.approx(found, rel=1e-6)
        expected = largest(own, schedule[:number])
        assert (found["epsilon"], found["epsilon_own_noise"]) == pytest.approx(expected, rel=1e-6)


def test_a_client_that_has_not_joined_counts_from_the_round_in_which_it_is_known() -> None:
    own = plans(PRIVACY, [30, 90])
    spent = Spent([], STEPS)
    late = {1: own[1]}
    assert spent.add([0, 1], late)["epsilon"] == pytest.approx(own[1].epsilon(STEPS), rel=1e-6)
    assert spent.add([1], own)["epsilon"] == pytest.approx(max(own[0].epsilon(STEPS), own[1].epsilon(4)), rel=1e-6)


def test_without_privacy_there_is_none() -> None:
    open_plans = plans(PrivacyConfig(noise="none", clip_norm=None), [30])
    assert Spent([], STEPS).add([0], open_plans) == {}


@pytest.mark.parametrize(
    ("rate", "sigma"),
    [(1.0, 20.0), *integration((0.1, 1.5), (0.01, 0.6))],
)
def test_a_composition_that_grows_is_an_upper_bound_as_good_as_the_direct_one(rate: float, sigma: float) -> None:
    """200 additions: neither rounding nor cut tails add up to anything."""
    growing = Composition(Steps(rate, sigma, 1), 1e-5)
    for count in range(3, 601, 3):
        found = growing.epsilon(count)
    assert found == pytest.approx(epsilon([Steps(rate, sigma, 600)], 1e-5), rel=1e-6)
    assert growing.epsilon(600) == found


def test_a_composition_without_noise_or_steps() -> None:
    assert Composition(Steps(0.1, 1.0, 1), 1e-5).epsilon(0) == 0.0
    assert math.isinf(Composition(Steps(0.1, 0.0, 1), 1e-5).epsilon(1))


@pytest.mark.parametrize(("clients", "rounds", "participants"), [(5, 7, 2), (10, 1, 10), (7, 30, 3)])
def test_counts_are_those_of_the_schedule(clients: int, rounds: int, participants: int) -> None:
    schedule = participation_schedule(clients, rounds, participants, seed=3)
    counts = participation_counts(clients, rounds, participants, seed=3)
    assert counts == tuple(sum(client in who for who in schedule) for client in range(clients))
